"""What a recipe says about its image-text pairs."""

from typing import Literal

from pydantic import Field, field_validator

from pipelines.config import Config, runtime


class Columns(Config):
    """Names of a table's columns; None is filled by the names that data sets use (URL, TEXT, file_name…).

    A table has either `url` (downloaded) or `image` (a path relative to the table, or the picture's bytes).
    `text` may hold a string or a list of strings.
    """

    url: str | None = None
    image: str | None = None
    text: str | None = None


class Download(Config):
    """How pictures are fetched over HTTP.

    Args:
        connect_to: requests for a host go to another address, as curl's option of that name does it:
            `{pictures.example: "127.0.0.1:8080"}`. The addresses named here may be private ones.
        connections: open at once, over all workers.
        connections_per_host: the same, to any one host.
        timeout_s: of one attempt, from the request to the last byte.
        retries: further attempts after timeouts, connection errors, and the statuses 429 and 5xx.
        allow_private_addresses: also fetch from loopback and private networks.
        user_agent: what servers are told we are.
    """

    connect_to: dict[str, str] = runtime({})
    connections: int = runtime(64, ge=1)
    connections_per_host: int = runtime(32, ge=1)
    timeout_s: float = runtime(10.0, gt=0)
    retries: int = runtime(2, ge=0)
    allow_private_addresses: bool = runtime(False)
    user_agent: str = runtime("ldm-pipelines/0.1")

    @field_validator("connect_to")
    @classmethod
    def _host_to_address(cls, value: dict[str, str]) -> dict[str, str]:
        for host, address in value.items():
            target, _, port = address.rpartition(":")
            if not target or not port.isdigit():
                raise ValueError(f"connect_to.{host} must be ADDRESS:PORT, got {address!r}")
            if host.replace(".", "").isdigit() or ":" in host:
                raise ValueError(f"connect_to takes names of hosts, got {host!r}: set allow_private_addresses instead")
        return {host.lower(): address for host, address in value.items()}


class PairsConfig(Config):
    """The `pairs` stage: raw image-text pairs to WebDataset shards.

    Args:
        source: a table (.parquet .csv .tsv .jsonl), a folder of pictures with captions or of parquet files,
            WebDataset tars; a local path, a glob or any fsspec URL. Known by content: it may move.
        format: what the source is; `auto` looks at it.
        columns: of a table; the field's usual names are found without it.
        limit: only the first rows of the source.
        image_size: pixels of the shorter side after resizing.
        resize: `center_crop` (square of exactly `image_size`, what training needs: smaller pictures are
            enlarged) or `keep_ratio` (smaller pictures stay as they are).
        min_size: source pictures with a shorter side (pixels) below this are `too_small`.
        encode: how pictures are stored; `quality` for jpg and webp.
        max_image_bytes, max_image_pixels: larger source pictures are `too_large`; checked before decoding.
        min_similarity: rows whose `similarity` column is below this are `filtered:similarity`.
        deduplicate: drop later rows whose source bytes (or URL) were seen at a smaller row.
        rows_per_shard: input rows of one shard; the unit of work, of commit and of retry.
        download: how pictures behind URLs are fetched.
        workers: shards in the making at once; None for what the cluster's CPUs can do.
    """

    source: str = runtime(min_length=1)
    format: Literal["auto", "table", "folder", "webdataset"] = "auto"
    columns: Columns = Columns()
    limit: int | None = Field(None, ge=1)
    image_size: int = Field(256, ge=8)
    resize: Literal["center_crop", "keep_ratio"] = "center_crop"
    min_size: int = Field(0, ge=0)
    encode: Literal["jpg", "webp", "png"] = "jpg"
    quality: int = Field(95, ge=1, le=100)
    max_image_bytes: int = Field(50_000_000, ge=1)
    max_image_pixels: int = Field(100_000_000, ge=1)
    min_similarity: float | None = None
    deduplicate: bool = True
    rows_per_shard: int = Field(1000, ge=1, le=10_000)
    download: Download = runtime(Download())
    workers: int | None = runtime(None, ge=1)
