"""Runs beside each other: in threads, interleaved, given up; what belongs to which."""

import gc
import sys
import threading
import weakref

import pytest
import torch

import tiny
from guidekit import Condition, Guidance, Sampling, Segment, attach, box_mask
from guidekit.errors import GuidekitError
from guidekit.toolbox import token_columns
from guidekit_pww import PaintWithWords
from guidekit_slg import SkipLayer
from guidekit_zest import Zest

LEFT, RIGHT = box_mask((0, 0, 0.5, 1)), box_mask((0.5, 0, 1, 1))
PROMPT = "a red circle and a blue square"
ONE = Condition(PROMPT, segments=(Segment("red circle", LEFT), Segment("blue square", RIGHT)))
TWO = Condition(PROMPT, segments=(Segment("red circle", RIGHT), Segment("blue square", LEFT)))
SPLIT = {"null+cond*": "split", "null+cond*+slg": "split"}


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd_pipeline()


@pytest.fixture
def switching():
    """Threads take turns far more often than they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def run(pipe, condition, guidances, seed, **options):
    given = {"steps": 5, "cfg": 5.0, "calls": SPLIT} | options
    return Sampling(pipe, condition, guidances, seeds=[seed], **given)


def test_threads_that_read_by_one_tokenizer_do_not_meet(pipe, switching):
    counts, ends = set(), threading.Event()

    def look_up():
        while not ends.is_set():
            token_columns(pipe.tokenizer, ONE.prompt, "red circle")

    thread = threading.Thread(target=look_up)
    thread.start()
    for _ in range(100):
        text = run(pipe, ONE, [], 0).run.text([ONE.prompt, "a"])
        counts.add(text.states.shape[1])
    ends.set()
    thread.join()
    assert counts == {pipe.tokenizer.model_max_length}


def wrapped(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: [Zest(stop=1.0)],
        lambda: [PaintWithWords(scale=2.0)],
        lambda: [Zest(stop=1.0), SkipLayer.example(), PaintWithWords()],
    ],
)
def test_two_threads_on_one_model_are_both_right(pipe, make):
    jobs = {"one": (ONE, 0), "two": (TWO, 1)}
    expected = {k: run(pipe, c, make(), seed).finish().latents for k, (c, seed) in jobs.items()}
    found, together = {}, threading.Barrier(2)

    def work(name):
        condition, seed = jobs[name]
        sampling = run(pipe, condition, make(), seed)
        for _ in sampling:
            together.wait(60)  # the threads meet at every step
        found[name] = sampling.latents

    threads = [threading.Thread(target=work, args=(name,)) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[name], expected[name]) for name in jobs)
    assert not wrapped(pipe.unet)


@pytest.mark.parametrize("make", [lambda: [Zest(stop=1.0)], lambda: [PaintWithWords(scale=2.0)]])
def test_interleaved_runs_are_both_right_and_leave_no_trace(pipe, make):
    expected = [run(pipe, c, make(), i).finish().latents for i, c in enumerate((ONE, TWO))]
    runs = [run(pipe, c, make(), i) for i, c in enumerate((ONE, TWO))]
    for _ in zip(*runs, strict=True):
        pass
    assert all(torch.equal(r.latents, e) for r, e in zip(runs, expected, strict=True))
    assert not wrapped(pipe.unet)


def test_a_run_that_is_given_up_leaves_the_other_alone():
    pipe = tiny.sd_pipeline()
    pipe.unet.requires_grad_(True).train()
    expected = run(pipe, ONE, [Zest(stop=1.0)], 0).finish().latents
    kept, left = run(pipe, ONE, [Zest(stop=1.0)], 0), iter(run(pipe, TWO, [PaintWithWords()], 1))
    steps = iter(kept)
    next(steps), next(left), next(steps)
    left.close()
    assert not any(p.requires_grad for p in pipe.unet.parameters())
    assert not pipe.unet.training
    for _ in steps:
        pass
    assert torch.equal(kept.latents, expected)
    assert all(p.requires_grad for p in pipe.unet.parameters())
    assert pipe.unet.training
    assert not wrapped(pipe.unet)


def test_one_guidance_in_two_runs(pipe):
    for guidance in (PaintWithWords(scale=2.0), Zest(stop=1.0)):
        before = dict(vars(guidance))
        expected = run(pipe, ONE, [guidance], 0).finish().latents
        first, second = run(pipe, ONE, [guidance], 0), run(pipe, TWO, [guidance], 1)
        assert torch.equal(first.finish().latents, expected)
        assert not torch.equal(second.finish().latents, expected)
        assert vars(guidance) == before


def test_containers_of_a_guidance_are_the_runs_own_and_networks_are_shared(pipe):
    class Keeps(Guidance):
        def __init__(self):
            super().__init__()
            self.seen, self.network = [], torch.nn.Linear(2, 2)

        def edit_prediction(self, step, out):
            self.seen.append(step.index)
            return out * 1.0

    guidance = Keeps()
    first, second = (run(pipe, ONE, [guidance], 0).finish().guidances[0] for _ in range(2))
    assert first.seen == second.seen == [0, 1, 2, 3, 4]
    assert guidance.seen == []
    assert first.network is second.network is guidance.network


def test_two_of_a_class_have_names_of_their_own(pipe):
    sampling = run(pipe, ONE, [Zest(stop=1.0), Zest(start=0.5, stop=0.5)], 0)
    with pytest.warns(UserWarning, match="zest-2 never acted"):
        sampling.finish()
    assert {row["plugin"] for row in sampling.account.rows} == {"zest"}


def test_a_run_is_drawn_once(pipe):
    sampling = run(pipe, ONE, [], 0).finish()
    with pytest.raises(GuidekitError, match="begun already.*guidekit.sample again"):
        sampling.finish()


def test_a_run_inside_of_a_hook_of_another(pipe):
    inner = []

    class Draws(Guidance):
        def edit_prediction(self, step, out):
            if step.index == 1:
                inner.append(run(pipe, TWO, [PaintWithWords(scale=2.0)], 1).finish().latents)
            return out

    alone = run(pipe, TWO, [PaintWithWords(scale=2.0)], 1).finish().latents
    expected = run(pipe, ONE, [Zest(stop=1.0)], 0).finish().latents
    with pytest.warns(UserWarning, match="draws never acted"):
        found = run(pipe, ONE, [Draws(), Zest(stop=1.0)], 0).finish().latents
    assert torch.equal(found, expected)
    assert torch.equal(inner[0], alone)


def test_the_pipeline_of_the_user_is_not_shown_to_a_run(pipe):
    """Calls between two steps, from the same thread, are the user's own."""
    generator = lambda: [torch.Generator().manual_seed(3)]  # noqa: E731
    options = {"num_inference_steps": 2, "output_type": "latent"}
    bare = pipe(PROMPT, generator=generator(), **options).images
    steps = iter(run(pipe, ONE, [PaintWithWords(scale=2.0)], 0))
    next(steps)
    assert wrapped(pipe.unet)
    assert torch.equal(pipe(PROMPT, generator=generator(), **options).images, bare)
    steps.close()


def test_an_attached_pipeline_beside_a_run(pipe):
    expected = run(pipe, TWO, [Zest(stop=1.0)], 1).finish().latents
    with attach(pipe, [PaintWithWords(scale=2.0)], segments=ONE.segments):
        pipe(PROMPT, num_inference_steps=2, output_type="latent")
        assert not wrapped(pipe.unet) or wrapped(pipe.unet) == [""]
    assert torch.equal(run(pipe, TWO, [Zest(stop=1.0)], 1).finish().latents, expected)


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_graph_outlives_its_step_and_no_step_the_run(dtype, memory):
    pipe = tiny.sd_pipeline().to(dtype)
    saved, alive, steps = [0], [], []

    class Box:
        def __init__(self, tensor):
            self.tensor = tensor.detach()
            saved[0] += 1

        def __del__(self):
            saved[0] -= 1

    class Look(Guidance):
        def edit_prediction(self, step, out):  # the last hook before the scheduler's step
            alive.append(saved[0])
            return out * 1.0

    guidances = [Zest(stop=1.0), PaintWithWords(), Look()]
    sampling = run(pipe, ONE, guidances, 0, steps=2, memory=memory)
    with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
        for step in sampling:
            steps.append(weakref.ref(step))
    engine = weakref.ref(sampling.engine)
    del step, sampling
    gc.collect()
    assert alive == [0, 0]
    assert not any(ref() for ref in steps)
    assert engine() is None
