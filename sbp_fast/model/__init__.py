"""The transformer, its saved form, its parameters, operations and memory, and conversion to Hugging Face."""
