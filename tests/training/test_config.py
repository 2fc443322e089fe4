import pytest

from gift_trl import GIFTConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("confidence_exponent", -1.0, "finite number of at least 0"),
        ("confidence_exponent", float("nan"), "finite number of at least 0"),
        ("confidence_floor", 1.5, "between 0 and 1"),
        ("confidence_floor", -0.1, "between 0 and 1"),
        ("eos_confidence", 2.0, "between 0 and 1, or be None"),
        ("weight_normalization", "batch", "choose one of"),
        ("annotator", "teacher", "choose one of"),
        ("eos_confidence", False, "must be a number, or `null`"),
        ("confidence_floor", True, "must be a number"),
        ("confidence_exponent", None, "must be a number"),
        ("confidence_exponent", "1", "must be a number"),
    ],
)
def test_invalid_values_are_refused_at_construction(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=rf"`{field}` is .*{message}"):
        GIFTConfig(str(tmp_path), bf16=False, **{field: value})


def test_the_revision_has_one_place(tmp_path):
    with pytest.raises(ValueError, match="Name the revision in `instruct_model_revision`"):
        GIFTConfig(str(tmp_path), bf16=False, instruct_model_init_kwargs={"revision": "v1"})


def test_defaults_are_the_paper_s_method(tmp_path):
    args = GIFTConfig(str(tmp_path), bf16=False)
    assert (args.confidence_exponent, args.confidence_floor, args.eos_confidence) == (1.0, 1e-4, 1.0)
    assert (args.weight_normalization, args.annotator) == ("weights", "instruct")


def test_init_kwargs_may_be_given_as_json(tmp_path):
    args = GIFTConfig(str(tmp_path), bf16=False, instruct_model_init_kwargs='{"dtype": "bfloat16"}')
    assert args.instruct_model_init_kwargs == {"dtype": "bfloat16"}


def test_help_of_every_own_field_says_what_the_docstring_says():
    own = set(GIFTConfig.__dataclass_fields__) - set(GIFTConfig.__mro__[1].__dataclass_fields__)
    assert len(own) == 16
    for name in own:
        assert GIFTConfig.__dataclass_fields__[name].metadata["help"]
        assert f"        {name} (`" in GIFTConfig.__doc__
