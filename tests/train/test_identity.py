"""A stage knows what it was made of, and refuses to go on as another."""

import pytest
from PIL import Image

from guidekit.errors import GuidekitError
from guidekit.train.identity import digest_of
from guidekit.train.recipe import train

TEXT = """
model = "m"
size = {size}
[[stage]]
task = "digits"
width = {width}
features = 8
steps = {steps}
batch = 4
save_every = {save}
preview_every = 100
"""


def trained(folder, size=8, width=8, steps=2, save=1, **overrides):
    path = folder / "r.toml"
    path.write_text(TEXT.format(size=size, width=width, steps=steps, save=save))
    return train(path, folder / "runs", quiet=True, overrides=overrides)


def test_a_finished_stage_of_a_changed_recipe_is_refused(tmp_path):
    trained(tmp_path)
    trained(tmp_path, save=2, workers=1)  # which decide no weight
    with pytest.raises(GuidekitError, match="begun with width 8, not 16: .* --set changed=allow"):
        trained(tmp_path, width=16)
    with pytest.raises(GuidekitError, match="steps 2, not 4; "):
        trained(tmp_path, steps=4, lr=1e-2)


def test_a_change_that_the_user_wants_goes_on_from_the_checkpoint(tmp_path):
    model = trained(tmp_path)
    before = (model / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.warns(UserWarning, match="begun with steps 2, not 4; it goes on all the same"):
        trained(tmp_path, steps=4, changed="allow")
    assert (model / "diffusion_pytorch_model.safetensors").read_bytes() != before
    rows = (tmp_path / "runs/m/digits/metrics.jsonl").read_text().splitlines()
    assert '"step": 4' in rows[-1]
    trained(tmp_path, steps=4)  # it is what the stage is now


PICTURES = """
model = "n"
size = 32
[[stage]]
task = "noisy-clip"
data = "{data}"
steps = {steps}
batch = 4
preview_every = 100
"""


def pictures(folder, colour):
    folder.mkdir(exist_ok=True)
    for i in range(6):
        Image.new("RGB", (32, 32), (colour, 10 * i, 0)).save(folder / f"{i}.png")


def test_other_images_under_the_same_names_are_refused(tmp_path):
    path = tmp_path / "n.toml"
    path.write_text(PICTURES.format(data=tmp_path / "data", steps=1))
    pictures(tmp_path / "data", 10)
    model = train(path, tmp_path, quiet=True)
    pictures(tmp_path / "data", 20)
    with pytest.raises(GuidekitError, match="begun with files of data .* not "):
        train(path, tmp_path, quiet=True)
    for file in (tmp_path / "data").iterdir():  # a finished model needs them no longer
        file.unlink()
    (tmp_path / "data").rmdir()
    assert train(path, tmp_path, quiet=True) == model


def test_a_digest_is_of_names_sizes_and_beginnings_of_files(tmp_path):
    for i in range(600):
        (tmp_path / f"{i:03d}").write_text("x")
    first = digest_of(tmp_path)
    assert first == digest_of(tmp_path)
    (tmp_path / "000").write_text("y")
    assert digest_of(tmp_path) != first
    (tmp_path / "000").write_text("x")
    (tmp_path / "599").write_text("xx")
    assert digest_of(tmp_path) != first
