from sbp_fast.generate.rng import document_uniforms


def test_every_sample_of_every_document_has_its_own_stream() -> None:
    streams = {
        (seed, document, number): tuple(document_uniforms(seed, document, number, 5))
        for seed in (0, 1, -1)
        for document in (0, 1, 2)
        for number in (0, 1, 2)
    }
    values = [value for stream in streams.values() for value in stream]
    assert len(set(values)) == len(values)  # no stream is another one shifted
    assert streams[1, 2, 0] == tuple(document_uniforms(1, 2, 0, 50)[:5])
