"""Recipes: what is refused, in which words, and what round-trips."""

import traceback
from pathlib import Path

import pytest
import yaml

from jobs.recipes import FOLDER, recipe_path
from pipelines.errors import MisuseError, UserError
from pipelines.run.plan import Selection, check, stages_of
from pipelines.run.recipe import Recipe, load_recipe, parse_recipe

DEMO = FOLDER / "demo.yaml"


SECRET = "never-to-be-seen"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_its_resolved_form_is_a_recipe(path: Path) -> None:
    recipe = load_recipe(path, ("pairs.source=somewhere",))
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pairs.sorce=x", "unknown key 'pairs.sorce'; did you mean 'source'"),
        ("dffusion.x=1", "unknown key 'dffusion'; did you mean 'diffusion'"),
        ("diffusion.unet.model_chanels=64", "did you mean 'model_channels'"),
        ("diffusion.training.steps=0", "diffusion.training.steps: Input should be greater than or equal to 1, got 0"),
        ("autoencoder.model=kl-f9", "kl-f9"),
        ("autoencoder.training=null", "either `weights`"),
        ("pairs.encode=gif", "pairs.encode"),
        ("pairs.source=", "pairs.source"),
        ("pairs", "--set takes section.key=value, but got 'pairs'"),
        ("pairs.limit=[1", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line_that_says_what_to_do(override: str, message: str) -> None:
    with pytest.raises(MisuseError) as caught:
        load_recipe(DEMO, (override,))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "pairs.image_size=128",
            "pairs.image_size must be diffusion.unet.latent_size x the first stage's downsampling",
        ),
        ("autoencoder.model.embed_dim=3", "diffusion.unet.in_channels must be autoencoder.model.embed_dim, 3, got 4"),
        ("diffusion.preview.num_steps=1001", "num_steps must be at most diffusion.schedule.timesteps, 1000, got 1001"),
        ("diffusion.text.width=64", "diffusion.unet.context_dim must be condition.transformer.width, 64, got 128"),
    ],
)
def test_sections_that_do_not_fit_are_refused_only_for_the_stages_that_need_them(override: str, message: str) -> None:
    recipe = load_recipe(DEMO, (override,))
    for selection in (Selection(), Selection(only="diffusion"), Selection(first="latents")):
        with pytest.raises(MisuseError) as caught:
            check(recipe, selection)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    check(recipe, Selection(only="pairs"))
    check(recipe, Selection(last="latents"))


def test_evaluation_visits_no_more_timesteps_than_there_are() -> None:
    recipe = load_recipe(DEMO, ("evaluate.sampling.num_steps=5000",))
    with pytest.raises(MisuseError, match=r"evaluate\.sampling\.num_steps must be at most .*timesteps, 1000, got 5000"):
        check(recipe, Selection())
    check(recipe, Selection(last="diffusion"))


def test_a_rectified_flow_is_sampled_without_eta() -> None:
    flow = ("diffusion.schedule.kind=rectified_flow", "diffusion.parameterization=flow")
    check(load_recipe(DEMO, flow), Selection())
    for field in ("diffusion.preview", "evaluate.sampling"):
        with pytest.raises(MisuseError, match=rf"{field}\.eta must be 0 with .*rectified_flow, got 0\.5"):
            check(load_recipe(DEMO, (*flow, f"{field}.eta=0.5")), Selection())
    with pytest.raises(MisuseError, match="with a rectified_flow use parameterization flow") as caught:
        load_recipe(DEMO, flow[:1])
    assert "\n" not in str(caught.value)


def test_a_recipe_of_pairs_alone_has_one_stage_and_refuses_the_others_by_name() -> None:
    recipe = load_recipe(recipe_path("pairs"), ("pairs.source=somewhere",))
    assert [stage.name for stage in stages_of(recipe)] == ["pairs"]
    check(recipe, Selection())
    with pytest.raises(MisuseError, match="recipe pairs has no stage latents: its stages are pairs; add the missing"):
        check(recipe, Selection(only="latents"))


def test_the_sides_of_buckets_must_fit_the_first_stage_and_the_unet() -> None:
    def buckets(step: int, *more: str) -> Recipe:
        return load_recipe(DEMO, ("pairs.resize=buckets", f"pairs.buckets.step={step}", "pairs.image_size=64", *more))

    check(buckets(16), Selection())
    coarse = buckets(8, "autoencoder.model.channel_mult=[1,1,2,2,4]")
    for stage in ("autoencoder", "latents"):
        with pytest.raises(
            MisuseError, match=r"pairs.buckets.step must be .* first stage's downsampling factor, 16, got 8"
        ):
            check(coarse, Selection(only=stage))
    check(coarse, Selection(only="pairs"))
    with pytest.raises(
        MisuseError, match=r"step must be .* first stage's x the UNet's downsampling factor, 8 x 2, got 8"
    ):
        check(buckets(8), Selection())
    check(buckets(8), Selection(last="latents"))
    with pytest.raises(MisuseError, match=r"diffusion.mix takes latents of one size, and pairs.resize=buckets gives"):
        check(buckets(16, "diffusion.mix=[{latents: elsewhere, weight: 0.5}]"), Selection())


def test_latents_are_mixed_by_shares_that_leave_something_to_the_runs_own() -> None:
    mix = ({"latents": "somewhere", "weight": 0.25}, {"latents": "elsewhere", "weight": 0.5})
    values = yaml.safe_load(DEMO.read_text())
    diffusion = parse_recipe({**values, "diffusion": {**values["diffusion"], "mix": list(mix)}}).diffusion
    assert diffusion is not None
    assert [each.weight for each in diffusion.mix] == [0.25, 0.5]
    with pytest.raises(MisuseError, match=r"diffusion: the weights in mix must add up to less than 1, .* got 1.25"):
        parse_recipe({**values, "diffusion": {**values["diffusion"], "mix": [*mix, mix[1]]}})
    with pytest.raises(MisuseError, match=r"unknown key 'diffusion.mix.0.wight'; did you mean 'weight'"):
        parse_recipe({**values, "diffusion": {**values["diffusion"], "mix": [{"latents": "a", "wight": 0.1}]}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion": None}, "section `diffusion` is empty: fill it in, or take it out"),
        ({"autoencoder": None}, "section `autoencoder` is empty"),
    ],
)
def test_an_empty_section_is_refused_and_not_taken_for_a_stage_left_out(changes: dict[str, None], message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        parse_recipe(yaml.safe_load(DEMO.read_text()) | changes)


@pytest.mark.parametrize(("gone", "left"), [("diffusion", "evaluate"), ("autoencoder", "latents")])
def test_a_section_without_the_one_it_needs_is_refused(gone: str, left: str) -> None:
    values = yaml.safe_load(DEMO.read_text())
    values.pop(gone)
    values.pop("diffusion", None)
    if left == "latents":
        values.pop("evaluate", None)
        values.pop("export", None)
    with pytest.raises(MisuseError, match=f"section `{left}` needs a section `{gone}`: add it, or take `{left}` out"):
        parse_recipe(values)


def test_a_diffusion_model_without_a_first_stage_is_refused() -> None:
    values = yaml.safe_load(DEMO.read_text())
    values.pop("autoencoder")
    with pytest.raises(MisuseError, match="add a section `autoencoder` to the recipe"):
        parse_recipe(values)


def test_a_missing_section_is_named() -> None:
    with pytest.raises(MisuseError, match=r"pairs.source is missing: add it to the recipe or pass --set pairs.source="):
        parse_recipe({**yaml.safe_load(DEMO.read_text()), "pairs": {}})


def test_an_unreadable_recipe_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read recipe"):
        load_recipe(tmp_path / "missing.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(MisuseError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")


def test_an_unknown_recipe_name_suggests_the_nearest() -> None:
    with pytest.raises(MisuseError, match="did you mean 'demo'"):
        recipe_path("dmo")


def test_fields_laid_over_a_preset_keep_the_rest_of_it() -> None:
    recipe = load_recipe(DEMO, ("autoencoder.model=kl-f8", "autoencoder.model.base_channels=64"))
    assert recipe.autoencoder is not None
    assert recipe.autoencoder.model.base_channels == 64
    assert recipe.autoencoder.model.channel_mult == (1, 2, 4, 4)


def test_only_what_can_change_the_output_is_part_of_the_identity() -> None:
    base = load_recipe(DEMO)
    workers = load_recipe(DEMO, ("pairs.workers=7", "diffusion.training.workers=4", "pairs.source=/moved/elsewhere"))
    quality = load_recipe(DEMO, ("pairs.quality=80",))
    assert workers.pairs.identity() == base.pairs.identity()
    assert workers.diffusion.identity() == base.diffusion.identity()
    assert quality.pairs.identity() != base.pairs.identity()


@pytest.mark.parametrize(
    ("override", "field", "advice"),
    [
        (f"tracking.uri=postgresql://mlflow:{SECRET}@db/mlflow", "tracking.uri", "PGPASSWORD or ~/.pgpass"),
        (f"tracking.uri=https://{SECRET}@mlflow.example", "tracking.uri", "MLFLOW_TRACKING_TOKEN"),
        (f"tracking=https://user:{SECRET}@mlflow.example", "tracking", "set MLFLOW_TRACKING_URI in the environment"),
        (f"root=s3://KEY:{SECRET}@bucket/run", "root", "AWS_PROFILE"),
        (f"pairs.source=https://a.example/x.parquet?X-Amz-Signature={SECRET}", "pairs.source", "AWS_PROFILE"),
        (f"pairs.source=[s3://KEY:{SECRET}@bucket/x]", "pairs.source.0", "AWS_PROFILE"),
        (f"autoencoder.weights=az://models/kl?sig={SECRET}", "autoencoder.weights", "AWS_PROFILE"),
        (f"cluster.address=ray://user:{SECRET}@head:10001", "cluster.address", "RAY_AUTH_TOKEN"),
    ],
)
def test_a_secret_in_a_recipe_is_refused_by_the_name_of_its_field_and_not_repeated(
    override: str, field: str, advice: str
) -> None:
    with pytest.raises(MisuseError) as caught:
        load_recipe(DEMO, (override,))
    assert f"{field} must not hold a password, token or signature" in str(caught.value)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)
    # Nor in what --debug prints: pydantic quotes every value that it refuses.
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("mistake", ["tracking.url=", "", "pairs: {x: [", "- "], ids=["key", "nothing", "yaml", "list"])
def test_a_secret_is_not_repeated_where_another_mistake_is_refused(mistake: str, tmp_path: Path) -> None:
    secret = f"postgresql://mlflow:{SECRET}@db/mlflow"
    with pytest.raises(MisuseError) as caught:
        load_recipe(DEMO, (f"{mistake}{secret}",))
    assert SECRET not in str(caught.value)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{mistake}{secret}: [\n", encoding="utf-8")
    with pytest.raises(MisuseError) as caught:
        load_recipe(path)
    assert SECRET not in str(caught.value)
