"""Semantica's trainer: the loss falls, a kill at random changes nothing, two processes are one."""

import io
import json
import multiprocessing
import os
import random
import shutil
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import semantica_tiny
from guidekit import load
from guidekit.errors import GuidekitError
from guidekit.semantica.data import Store
from guidekit.semantica.pages import bounds, image_count, make_episodes, source_parts
from guidekit.semantica.train import SemanticaOptions, make
from guidekit.train.loop import Loop, Options, lr_at
from guidekit.train.recipe import read_recipe, task_kind, train
from semantica_tiny import all_pairs as pairs_of
from semantica_tiny import losses, write

pytestmark = pytest.mark.usefixtures("small_uvit")


def dying(recipe, out, at):
    """In a process of its own: trains, and kills itself before step `at`."""
    torch.set_num_threads(1)
    step = Loop._train_step

    def counted(self):
        if self.step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    Loop._train_step = counted
    train(recipe, out, quiet=True)


def test_killed_at_random_the_curve_continues_as_if_not(encoder, tmp_path):
    recipe = write(tmp_path / "r.toml", encoder)
    model = train(recipe, tmp_path / "whole", quiet=True)
    child = multiprocessing.get_context("fork").Process(
        target=dying, args=(recipe, tmp_path / "cut", random.Random().randint(1, 5))
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    train(recipe, tmp_path / "cut", quiet=True)
    curve = losses(tmp_path / "whole")
    assert curve == losses(tmp_path / "cut")
    assert [s for s, _ in curve] == [1, 2, 3, 4, 5, 6]
    pipe = load(str(model))
    images = pipe(torch.rand(2, 3, 16, 16), num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    row = json.loads((tmp_path / "cut/small/semantica/metrics.jsonl").read_text().splitlines()[2])
    assert row["eta_seconds"] >= 0
    assert row["images_per_second"] > 0
    assert list((tmp_path / "cut/small/semantica").glob("preview-*.png"))


@pytest.fixture
def terminal():
    """Ctrl-C as at a terminal; programs in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_takes_effect_between_steps(encoder, tmp_path, monkeypatch, terminal):
    """Weights that moved without their step's number would move twice."""
    recipe = write(tmp_path / "r.toml", encoder)
    train(recipe, tmp_path / "whole", quiet=True)
    step = Loop._train_step

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Loop, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "cut", quiet=True)
    assert [s for s, _ in losses(tmp_path / "cut")] == [1, 2, 3]
    train(recipe, tmp_path / "cut", quiet=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_model_that_was_half_written_is_written_again(encoder, tmp_path, monkeypatch):
    recipe = write(tmp_path / "r.toml", encoder, steps=2)

    def dying(self, folder):
        folder.mkdir()
        (folder / "model_index.json").write_text("{")
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Loop, "export", dying)
        train(recipe, tmp_path, quiet=True)
    assert load(str(train(recipe, tmp_path, quiet=True)))


def test_other_bounds_make_other_pairs_and_other_data_are_refused(encoder, tmp_path):
    first = dict(encoder=str(encoder), pages=12, per_page=3, low=-2.0, high=2.0)
    every = pairs_of(make_episodes(SemanticaOptions(**first), tmp_path, 16, quiet=True)[0])
    fewer = SemanticaOptions(**first | {"quantiles": (0.4, 0.6), "low": None, "high": None})
    some = pairs_of(make_episodes(fewer, tmp_path, 16, quiet=True)[0])
    assert 0 < len(some) < len(every)
    for changes in ({"pages": 13}, {"source": "labelled-scenes"}):
        with pytest.raises(GuidekitError, match="give another folder or remove it"):
            make_episodes(SemanticaOptions(**first | changes), tmp_path, 16, quiet=True)


def test_pairs_are_of_the_pages_that_they_were_found_in(encoder, tmp_path):
    """Other pages of as many images in the same folder are filtered again."""
    found = []
    for split in (("red circle",), ("blue square",)):
        options = SemanticaOptions(encoder=str(encoder), pages=30, per_page=2, without=split)
        shutil.rmtree(tmp_path / "pages", ignore_errors=True)
        make_episodes(options, tmp_path, 16, quiet=True)
        found.append(json.loads((tmp_path / "filter/filter.json").read_text())["asked"])
    assert found[0]["pages"]["without"] == ["red circle"]
    assert found[1]["pages"]["without"] == ["blue square"]


def test_bounds_follow_the_encoder():
    tiny = semantica_tiny.encoder()
    dino = tiny.copied(source="timm/vit_base_patch14_dinov2.lvd142m")
    assert bounds(SemanticaOptions(), dino) == (0.3, 0.9, None)
    assert bounds(SemanticaOptions(), tiny) == (None, None, (0.02, 0.98))
    assert bounds(SemanticaOptions(low=0.5), tiny) == (0.5, None, None)
    assert bounds(SemanticaOptions(quantiles=(0.1, 0.9)), dino) == (None, None, (0.1, 0.9))


def test_pictures_that_were_added_are_not_overlooked(encoder, tmp_path):
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (len(name), 90, 40 * int(name[2]))).save(tmp_path / "in" / name)
    options = SemanticaOptions(
        encoder=str(encoder), source="folder", data=str(tmp_path / "in"), low=-2.0
    )
    make_episodes(options, tmp_path, 16, quiet=True)
    make_episodes(options, tmp_path, 16, quiet=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "in/b/2.png")
    with pytest.raises(GuidekitError, match="begun with files '.*', not '.*'; give another folder"):
        make_episodes(options, tmp_path, 16, quiet=True)


def test_a_checkpoint_of_another_model_is_refused(encoder, tmp_path):
    train(write(tmp_path / "r.toml", encoder, steps=2), tmp_path, quiet=True)
    shutil.rmtree(tmp_path / "small/semantica/model")
    (tmp_path / "small/semantica/stage.json").unlink()  # of a run before stages had one
    with pytest.raises(GuidekitError, match="is of another model; train into another folder"):
        train(write(tmp_path / "r.toml", encoder, 2, "film"), tmp_path, quiet=True)


def test_training_is_compiled_and_its_previews_are_not(encoder, tmp_path):
    """A preview has other shapes and no gradient, which would be compiled anew."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options = SemanticaOptions(encoder=str(encoder), pages=8, per_page=2)
    task = make(options, tmp_path, 16)
    task.net.unet.compile(fullgraph=True, backend=backend)
    loop = Loop(task, Options(steps=4, batch=4, preview_every=2), tmp_path / "run", quiet=True)
    loop.run()
    loop.export(tmp_path / "model")
    assert len(graphs) == 1
    assert len(list((tmp_path / "run").glob("preview-*.png"))) == 2


def test_without_a_compiler_training_is_not_compiled_and_says_so(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    options = SemanticaOptions(encoder=str(encoder), pages=8, per_page=2, compile=True)
    with pytest.warns(UserWarning, match="compile = true is passed over"):
        task = make(options, tmp_path, 16)
    assert task.net.unet._compiled_call_impl is None


def test_losses_are_means_over_what_is_accumulated(encoder, tmp_path):
    """As the gradient is: two batches of 4 at the first step are those of steps 1 and 2 alone."""
    write(tmp_path / "r.toml", encoder, steps=1, accumulate=2)
    train(tmp_path / "r.toml", tmp_path / "two", quiet=True)
    recipe = write(tmp_path / "s.toml", encoder, steps=2).read_text()
    (tmp_path / "s.toml").write_text(recipe.replace("lr = 2e-3", "lr = 0.0"))
    train(tmp_path / "s.toml", tmp_path / "one", quiet=True)
    ((_, both),) = losses(tmp_path / "two")
    assert both == pytest.approx(sum(loss for _, loss in losses(tmp_path / "one")) / 2, rel=1e-5)


def test_the_scale_of_half_precision_gradients_is_kept(encoder, tmp_path):
    """Where there is one, which is on a GPU."""
    options = SemanticaOptions(encoder=str(encoder), pages=8, per_page=2)
    loop = Loop(make(options, tmp_path, 16), Options(steps=2), tmp_path / "run", quiet=True)
    loop.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=7)
    loop.save()
    again = Loop(make(options, tmp_path, 16), Options(steps=2), tmp_path / "new", quiet=True)
    again.accelerator.scaler = torch.amp.GradScaler("cpu")
    again.folder = tmp_path / "run"
    again._load()
    assert again.accelerator.scaler.state_dict() == loop.accelerator.scaler.state_dict()


def test_the_loss_falls(encoder, tmp_path):
    train(write(tmp_path / "r.toml", encoder, 40, "film"), tmp_path, quiet=True)
    values = [value for _, value in losses(tmp_path)]
    assert sum(values[-8:]) < 0.9 * sum(values[:8])


def test_batches_are_functions_of_their_numbers_and_drop_conditions(encoder, tmp_path):
    options = SemanticaOptions(
        encoder=str(encoder), pages=20, per_page=2, low=-2.0, high=2.0, drop=0.5
    )
    task = make(options, tmp_path, 16)
    first, second = (task.batch(range(32, 64), torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    dropped = first["keep"].flatten() == 0
    assert 5 < int(dropped.sum()) < 27
    t = (first["timestep"] + 1) / 1000
    assert sorted((t * 32).long().tolist()) == list(range(32))  # spread evenly


@pytest.mark.parametrize(
    "options, message",
    [
        ({"source": "web"}, "no source 'web'; there are scenes"),
        ({"source": "folder"}, "source folder needs data"),
        ({"source": "shards", "data": "."}, "no .tar files"),
        ({"quantiles": (0.5,)}, "quantiles are two numbers"),
    ],
)
def test_wrong_options(options, message, encoder, tmp_path):
    options = SemanticaOptions(encoder=str(encoder), **options)
    with pytest.raises(GuidekitError, match=message):
        make_episodes(options, tmp_path, 16, quiet=True)
        source_parts(options, 16)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"tokens": "disk"}, "tokens must be auto or store or train, not 'disk'"),
        ({"first": 0.0}, "first must be above 0 and at most 1, not 0"),
        ({"limit": -1}, "grow must be 1 or more, limit and threads 0 or more"),
    ],
)
def test_numbers_that_make_no_sense(options, says, encoder, tmp_path):
    with pytest.raises(GuidekitError, match=says):
        make_episodes(SemanticaOptions(encoder=str(encoder), **options), tmp_path, 16)


def test_the_size_of_the_pages_is_said_before_and_tokens_are_kept_where_they_fit(
    encoder, tmp_path, capsys
):
    options = dict(encoder=str(encoder), pages=1000, per_page=4, limit=6, low=-2.0)
    task = make(SemanticaOptions(**options), tmp_path / "fit", 16, quiet=False)
    said = capsys.readouterr().out
    assert "about 6 images" in said
    assert "tokens 0.00 GB" in said
    assert "GB are free" in said
    assert task.net.frozen == [None]
    assert len(task.episodes.store) == 6
    small = SemanticaOptions(**options, tokens_most=1e-9)
    task = make(small, tmp_path / "not", 16, quiet=False)
    assert "tokens are encoded at every step" in capsys.readouterr().out
    assert task.net.frozen == [task.encoder]


def test_images_of_shards_are_estimated_by_the_first(tmp_path):
    import tarfile

    for name, count in (("0.tar", 3), ("1.tar", 6)):
        with tarfile.open(tmp_path / name, "w") as tar:
            for i in range(count):
                for suffix in ("jpg", "json"):
                    info = tarfile.TarInfo(f"{i}.{suffix}")
                    info.size = 4096
                    tar.addfile(info, io.BytesIO(bytes(4096)))
    options = SemanticaOptions(source="shards", data=str(tmp_path))
    assert image_count(options) == pytest.approx(9, abs=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_begins_before_everything_is_encoded(encoder, tmp_path, workers):
    """And goes on, whoever makes the batches, as one that was stopped in between."""
    for i, place in enumerate(["0", "1", "a/0", "a/1", "b/0", "b/1", "c/0", "c/1"]):  # four parts
        path = tmp_path / f"in/{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (30 * i, 90, 200 - 20 * i)).save(path)
    growing = dict(encoder=str(encoder), source="folder", data=str(tmp_path / "in"), low=-2.0)
    growing |= dict(first=0.25, grow=8)
    options = Options(steps=6, batch=4, save_every=100, log_every=1, preview_every=100)
    options.workers = workers
    seen = []

    def loop_of(name):
        torch.manual_seed(0)
        task = make(SemanticaOptions(**growing), tmp_path / name, 16)
        ready = task.ready

        def watched(end):
            ready(end)
            seen.append((end, len(Store(tmp_path / name / "pages"))))

        task.ready = watched
        return Loop(task, options, tmp_path / name / "run", quiet=True)

    loop_of("whole").run()
    assert seen == [(4, 2), (8, 2), (12, 4), (16, 4), (20, 8), (24, 8)]
    cut = loop_of("cut")
    step = cut._train_step

    def interrupted():
        if cut.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    cut._train_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    loop_of("cut").run()
    one, two = (load_file(tmp_path / n / "run/checkpoint.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_the_papers_optimizer(tmp_path):
    recipe = read_recipe("scenes-semantica")
    *_, stage = recipe.stages
    assert stage.task == "semantica"
    assert task_kind("semantica")[0] is type(stage.options)
    assert stage.loop.eps == 1e-12
    assert stage.loop.weight_decay == 0
    bare = tmp_path / "bare.toml"
    bare.write_text('model = "x"\nsize = 16\n[[stage]]\ntask = "semantica"\nsteps = 1')
    (stage,) = read_recipe(bare).stages
    loop = stage.loop
    assert (loop.ema, loop.eps, loop.weight_decay, loop.decay) == (0.9999, 1e-12, 0, "constant")
    assert loop.lr == 1e-4
    constant = Options(steps=10**7, decay="constant", lr=3e-4)
    assert lr_at(10**6, constant) == 3e-4
    with pytest.raises(GuidekitError, match="cosine or constant"):
        Options(steps=1, decay="linear")
