"""Semantica's trainer: wrong options, options changed between runs, divergence, trackers."""

import shutil

import pytest
from PIL import Image

from guidekit.errors import GuidekitError
from guidekit.semantica.train import SemanticaOptions, make
from guidekit.train.loop import Loop, Options
from guidekit.train.recipe import train
from semantica_tiny import losses, write

pytestmark = pytest.mark.usefixtures("small_uvit")


def test_a_training_that_diverges_ends_before_it_is_saved(encoder, tmp_path):
    recipe = write(tmp_path / "r.toml", encoder, steps=6)
    recipe.write_text(recipe.read_text().replace("lr = 2e-3", "lr = 1e30\nclip = 1e30"))
    recipe.write_text(recipe.read_text().replace("save_every = 2", "save_every = 1"))
    with (
        pytest.warns(UserWarning, match="the step is skipped"),
        pytest.raises(GuidekitError, match="lower lr or clip") as error,
    ):
        train(recipe, tmp_path, quiet=True)
    step = int(str(error.value).split("at step ")[1].split(";")[0])
    from safetensors import safe_open

    with safe_open(tmp_path / "small/semantica/checkpoint.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) < step
    finite = [loss is not None for _, loss in losses(tmp_path)]
    assert finite[0]
    assert not any(finite[1:])
    assert not (tmp_path / "small/semantica/model").exists()


def test_a_torn_last_row_of_the_log_is_dropped(encoder, tmp_path):
    recipe = write(tmp_path / "r.toml", encoder, steps=2)
    train(recipe, tmp_path, quiet=True)
    run = tmp_path / "small/semantica"
    shutil.rmtree(run / "model")
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "eps')
    with pytest.warns(UserWarning, match="begun with steps 2, not 3"):
        train(recipe, tmp_path, quiet=True, overrides={"steps": 3, "changed": "allow"})
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"variant": "d"}, "no variant 'd'; there are a, b, c, tiny, tiny-pixel"),
        ({"conditioning": "none"}, "tokens or film, not 'none'"),
        ({"reading": "both"}, "reading must be lineage or literal"),
        ({"frac": 5.0}, "frac must be from 0 to 1, not 5"),
        ({"noise_size": 0}, "noise_size must be 1 or more"),
    ],
)
def test_options_of_no_model_are_refused_at_once(options, says):
    with pytest.raises(GuidekitError, match=says):
        SemanticaOptions(**options)


def test_a_size_of_no_model_is_refused_before_pictures_are_encoded(encoder, tmp_path):
    with pytest.raises(GuidekitError, match="take a multiple of 2"):
        make(SemanticaOptions(encoder=str(encoder), pages=8, per_page=2), tmp_path, 17)
    assert not list(tmp_path.glob("*"))


def test_a_tracker_gets_what_is_logged(encoder, tmp_path, monkeypatch):
    from accelerate import tracking

    logged = []

    class Kept(tracking.GeneralTracker):
        name, requires_logging_directory, main_process_only = "kept", False, True

        def __init__(self, run_name, **kwargs):
            super().__init__()
            logged.append(run_name)

        tracker = property(lambda self: logged)

        def store_init_configuration(self, values):
            logged.append(values["steps"])

        def log(self, values, step=None, **kwargs):
            logged.append((step, sorted(values)))

    known = tracking.LoggerType.TENSORBOARD  # accelerate 1.10 knows no names but its own
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Kept)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [known])
    task = make(SemanticaOptions(encoder=str(encoder), pages=8, per_page=2), tmp_path, 16)
    options = Options(steps=2, batch=2, log_every=1, tracker="tensorboard")
    Loop(task, options, tmp_path / "run", True).run()
    columns = ["epsilon", "eta_seconds", "images_per_second", "lr", "skipped"]
    assert logged == ["guidekit", 2, (1, columns), (2, columns)]


def test_a_tracker_that_is_not_installed_is_named(encoder, tmp_path):
    task = make(SemanticaOptions(encoder=str(encoder), pages=8, per_page=2), tmp_path, 16)
    with pytest.raises(GuidekitError, match="pip install swanlab"):
        Loop(task, Options(steps=2, tracker="swanlab"), tmp_path / "run", True)


def test_a_folder_of_pages_may_hold_the_run(encoder, tmp_path):
    """Its previews are no pages, and its files do not make the pages others."""
    for page in ("one", "two"):
        for number in range(3):
            (tmp_path / page).mkdir(exist_ok=True)
            Image.effect_noise((20, 20), 40 + 9 * number).save(tmp_path / page / f"{number}.png")
    options = SemanticaOptions(
        encoder=str(encoder), source="folder", data=str(tmp_path), low=-2.0, high=2.0
    )
    run = tmp_path / "runs"
    Loop(make(options, run, 16), Options(steps=1, batch=2), run / "train", True).run()
    assert len(make(options, run, 16).episodes.store) == 6


def test_wrong_settings_are_refused_before_pictures_are_encoded(encoder, tmp_path):
    recipe = write(tmp_path / "r.toml", encoder)
    with pytest.raises(GuidekitError, match="accumulate must be 1 or more, not 0"):
        train(recipe, tmp_path, quiet=True, overrides={"accumulate": 0})
    assert not (tmp_path / "small/pages").exists()
