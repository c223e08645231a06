"""The demo's world: scenes of coloured shapes (`scenes`), what people write under them (`captions`), their
files (`encodings`), the table that lists them (`dataset`), and a web as bad as the real one (`web`)."""
