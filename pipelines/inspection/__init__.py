"""Facts about artifacts, shards and models (`inspect`), and checks of their integrity (`verify`)."""
