"""The `pairs` section of a recipe."""

import ipaddress
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config import Config, runtime

IdentifyBy = Literal["contents", "recorded", "listing"]


class Columns(Config):
    """Names of a table's columns; None is replaced by a name that data sets use (URL, TEXT, file_name…).

    A table has either `url` (downloaded) or `image` (a path relative to the table, or the picture's bytes).
    `text` may hold a string or a list of strings.
    """

    url: str | None = None
    image: str | None = None
    text: str | None = None


class Download(Config):
    """Downloads of pictures over HTTP. Numbers of connections are for one worker process, of which each CPU has one.

    Args:
        connect_to: sends requests for a host to another address, like curl's option of that name:
            `{pictures.example: "127.0.0.1:8080"}`. The addresses named here may be private ones.
        connections: most connections open at once.
        connections_per_host: most connections open at once to any one host.
        connect_timeout_s: time limit for a connection to be established.
        read_timeout_s: the longest pause between two pieces of an answer; rounded to whole seconds, at least one.
        timeout_s: time limit for one attempt, from the request to the last byte.
        retries: further attempts after transient failures: timeouts, broken connections, 408, 425, 429 and 5xx.
        max_retry_after_s: a server that asks for a longer pause (Retry-After) is not asked again until the pause is
            over; its rows fail until then.
        max_redirects: most redirects followed for one picture.
        allow_private_addresses: also fetch from every loopback and private address.
        allow_addresses: private networks that may be fetched from all the same: `["10.1.0.0/16"]`.
        user_agent: the `User-Agent` header; `X-Robots-Tag` directives for this name are respected too.
    """

    connect_to: dict[str, str] = runtime({})
    connections: int = runtime(128, ge=1)
    connections_per_host: int = runtime(32, ge=1)
    connect_timeout_s: float = runtime(5.0, gt=0)
    read_timeout_s: float = runtime(10.0, gt=0)
    timeout_s: float = runtime(20.0, gt=0)
    retries: int = runtime(2, ge=0)
    max_retry_after_s: float = runtime(30.0, ge=0)
    max_redirects: int = runtime(5, ge=0)
    allow_private_addresses: bool = runtime(False)
    allow_addresses: tuple[str, ...] = runtime(())
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

    @field_validator("allow_addresses")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for network in value:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ValueError(f"allow_addresses takes networks (10.1.0.0/16), got {network!r}: {error}") from None
        return value


class Rule(Config):
    """A filter's conditions on one value. All that are given must hold.

    Args:
        min, max: bounds of a number, both inclusive.
        one_of, not_one_of: texts that the value must (or must not) equal, ignoring case.
        matches, not_matches: a regular expression to be found (or not) anywhere in a text.
        keep_missing: whether rows without the value pass.
    """

    min: float | None = None
    max: float | None = None
    one_of: tuple[str, ...] | None = None
    not_one_of: tuple[str, ...] | None = None
    matches: str | None = None
    not_matches: str | None = None
    keep_missing: bool = False

    @field_validator("matches", "not_matches")
    @classmethod
    def _expression(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _asks_something(self) -> "Rule":
        if all(getattr(self, name) is None for name in type(self).model_fields if name != "keep_missing"):
            raise ValueError("a filter needs one of min, max, one_of, not_one_of, matches, not_matches")
        return self


class Buckets(Config):
    """The sizes that `resize: buckets` sorts pictures into: sides are multiples of `step`, areas at most image_size².

    Args:
        step: granularity of the sides in pixels.
        max_aspect: largest aspect ratio of a bucket, long side / short side.
    """

    step: int = Field(64, ge=8)
    max_aspect: float = Field(2.0, ge=1.0)


class Scoring(Config):
    """The models behind `filters.clip_score` and `filters.aesthetic_score`; they run on a pool of actors.

    Args:
        clip: folder of a CLIP model in the layout of open_clip or transformers.
        aesthetic_head: weights (.safetensors, .pth) of linear layers that turn the normalised embedding of a picture
            into one number, as LAION's predictors do.
        batch_size: pictures that are scored at once. Part of the key: kernels, and so the last digit of a score, may
            depend on it.
        workers, use_gpu: size of the pool, and whether it uses GPUs; None for whatever the cluster has.
    """

    clip: str = runtime(min_length=1)
    aesthetic_head: str | None = runtime(None)
    batch_size: int = Field(32, ge=1)
    workers: int | None = runtime(None, ge=1)
    use_gpu: bool | None = runtime(None)


class PairsConfig(Config):
    """The `pairs` stage: raw image-text pairs to WebDataset shards.

    Args:
        source: a table (.parquet .csv .tsv .jsonl), a folder of pictures with captions or of parquet files,
            WebDataset tars; a local path, a glob, a brace pattern or any fsspec URL. It is identified by its content
            and may move.
        format: the kind of source; `auto` finds out.
        identify_by: what tells one state of the source from another: the `contents` of its files, which are read once
            where the store has no checksum; the same, but with digests `recorded` beside them (SHA256SUMS) believed; or
            a `listing`, which reads nothing but does not recognise a copy elsewhere. See docs/pairs.md.
        columns: names of a table's columns; the usual names are found without it.
        captions: whether rows without a caption are left out (`required`) or are samples too (`optional`), for models
            that are conditioned on something else or on nothing.
        limit: use only this many rows from the start of the source.
        image_size: pixels of the shorter side after resizing.
        resize: `center_crop` (a square of exactly `image_size`), `keep_ratio` (shorter side), `border` (the whole
            picture on a white square), `buckets` (cropped to the nearest of several aspect ratios; a shard for each)
            or `none`.
        buckets: the sizes of `resize: buckets`.
        upscale: enlarge pictures that are too small. Otherwise `center_crop` and `buckets` leave them out as
            `too_small`, and the other modes keep their size.
        min_size: source pictures with a shorter side (pixels) below this are `too_small`.
        jpeg_scale: JPEGs are decoded at the `smallest` of the scales 1/8, 1/4, 1/2 and 1 that gives at least 1.5 times
            the size needed, at the `next` larger one, or in `full`.
        encode: the format in which pictures are stored.
        quality: compression quality of stored jpg and webp pictures, 1 to 100.
        pass_through: store a picture's own bytes if nothing about it would change.
        max_image_bytes, max_image_pixels: larger source pictures are `too_large`; checked before decoding.
        max_caption_bytes: rows whose captions are longer (UTF-8) are `caption_too_long`.
        opt_out: rows whose server answers with one of these `X-Robots-Tag` directives are `opt_out`.
        filters: rules by name: of a source's column (`similarity`, `punsafe`, …), of the caption (`caption_words`,
            `caption_characters`, `caption`), of the picture (`width`, `height`, `size` (shorter side), `aspect` (long
            side / short side), `entropy` (bits of the grey values), `sharpness` (variance of the Laplacian)) or of a
            model (`clip_score`, `aesthetic_score`). Rows that fail are `filtered:NAME`.
        scoring: the model that `clip_score` and `aesthetic_score` come from.
        deduplicate: drop later rows whose source bytes (or URL) were seen at a smaller row.
        near_duplicates: also drop later rows whose perceptual hash (64 bits) differs in at most this many bits.
        rows_per_shard: input rows of one shard, the unit of work and of commit. A file of the source with at least as
            many begins and ends shards of its own; the last one may have fewer.
        retry: `failed` fetches those rows of a finished artifact again whose failure was transient, and adds shards.
        download: how pictures behind URLs are fetched.
        workers: processes that make shards; None for one on each CPU of the cluster.
        shards_in_flight: shards that one worker fetches at once, so that slow hosts of one do not hold up the next.
    """

    source: str = runtime(min_length=1)
    format: Literal["auto", "table", "folder", "webdataset"] = "auto"
    # No part of the key by itself: `recorded` gives the same digest as `contents`, and `listing` another one.
    identify_by: IdentifyBy = runtime("contents")
    columns: Columns = Columns()
    captions: Literal["required", "optional"] = "required"
    limit: int | None = Field(None, ge=1)
    image_size: int = Field(256, ge=8)
    resize: Literal["center_crop", "keep_ratio", "border", "buckets", "none"] = "center_crop"
    buckets: Buckets = Buckets()
    upscale: bool = False
    min_size: int = Field(0, ge=0)
    jpeg_scale: Literal["smallest", "next", "full"] = "smallest"
    encode: Literal["jpg", "webp", "png"] = "jpg"
    quality: int = Field(95, ge=1, le=100)
    pass_through: bool = True
    max_image_bytes: int = Field(50_000_000, ge=1)
    max_image_pixels: int = Field(100_000_000, ge=1)
    max_caption_bytes: int = Field(1_000_000, ge=1)
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    filters: dict[str, Rule] = Field(default_factory=dict)
    scoring: Scoring | None = None
    deduplicate: bool = True
    near_duplicates: int | None = Field(None, ge=0, le=7)
    rows_per_shard: int = Field(1000, ge=1, le=10_000)
    retry: Literal["failed"] | None = runtime(None)
    download: Download = runtime(Download())
    workers: int | None = runtime(None, ge=1)
    shards_in_flight: int = runtime(8, ge=1)

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "PairsConfig":
        scores = sorted({"clip_score", "aesthetic_score"} & self.filters.keys())
        if scores and self.scoring is None:
            raise ValueError(f"filters.{scores[0]} needs a model: give pairs.scoring.clip")
        if "aesthetic_score" in scores and self.scoring is not None and self.scoring.aesthetic_head is None:
            raise ValueError("filters.aesthetic_score needs pairs.scoring.aesthetic_head")
        if self.scoring is not None and self.captions == "optional":
            raise ValueError("pairs.scoring compares pictures with their captions: set pairs.captions to required")
        if self.resize == "buckets" and self.image_size % self.buckets.step:
            raise ValueError(
                f"image_size must be a multiple of buckets.step, {self.buckets.step}; got {self.image_size}"
            )
        if self.near_duplicates is not None and not self.deduplicate:
            raise ValueError("near_duplicates needs deduplicate: true")
        return self
