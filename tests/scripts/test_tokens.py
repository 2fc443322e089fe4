"""Tokens on command lines and in recipes, which are refused and not repeated."""

import json

import pytest

from gift_trl.scripts.cli import run
from gift_trl.scripts.tokens import refuse_tokens


TOKEN = "hf_canaryThatMustBeReadNowhere"
NESTED = {"attn_implementation": "eager", "token": "secret-of-another-kind"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hub_token", "secret"],
        ["--hub-token=secret"],
        ["--hub_tok", "secret"],
        ["--token", "secret"],
        ["--hf_token", "secret"],
        ["--repo_id", TOKEN],
        [f"--server_base_url=https://user:{TOKEN}@example.org/v1"],
        [f"--dataset_name=https://huggingface.co/a?token={TOKEN}"],
        ["--model_init_kwargs", json.dumps(NESTED)],
        [f"--model_init_kwargs={json.dumps({'outer': [NESTED]})}"],
        ["--model_init_kwargs", "{token: secret-of-another-kind}"],
        ["--output_dir", "hf_oauth_canaryThatMustBeReadNowhere"],
        ["--output_dir", "own-token-of-another-hub"],
    ],
)
def test_command_line(arguments, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "own-token-of-another-hub")
    with pytest.raises(SystemExit) as ended:
        run(lambda argv: print("the command has run"), ["outputs/merged", *arguments])
    output = "".join(capsys.readouterr())
    assert ended.value.code == 1 and "take it out. Tokens are read only from `HF_TOKEN`" in output
    assert "the command has run" not in output and "secret" not in output and "canary" not in output


@pytest.mark.parametrize(
    "recipe",
    [
        "hub_token: secret",
        "hub-token: secret",
        f"hub_token: '{TOKEN}'",
        f"# my token is {TOKEN}\nseed: 1",
        "model_init_kwargs:\n  token: secret",
        'model_init_kwargs: \'{"token": "secret"}\'',
        "datasets:\n- path: a\n  use_auth_token: secret",
        "env:\n  HF_TOKEN: secret",
        f"dataset_name: https://user:{TOKEN}@example.org/data",
        f"seed: [1\nhub_token: {TOKEN}",
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_recipe(recipe, joined, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(ValueError, match="take it out") as refused:
        refuse_tokens([f"--config={path}"] if joined else ["--seed", "1", "--config", str(path)])
    assert str(path) in str(refused.value)
    assert "secret" not in str(refused.value) and "canary" not in str(refused.value)


def test_what_is_no_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "recipe.yaml").write_text(
        "eos_token: <|im_end|>\nmodel_init_kwargs: {token: true}\nhub_token: null\nchat_template: '{% if token %}x{% endif %}'\n"
    )
    models = ["--output_dir", "outputs/hf_merged_model", "--model_init_kwargs", '{"token": true}']
    texts = ["--eos_token", "<|end|>", "--max_new_tokens", "4", "--chat_template", "{{ token }}"]
    refuse_tokens(["--config", str(tmp_path / "recipe.yaml"), *models, *texts])
