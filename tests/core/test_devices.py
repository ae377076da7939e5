"""One image on two devices, by diffusers' context parallelism: what is right, what is refused."""

import multiprocessing
import os

import pytest
import torch

import guidekit
from guidekit.registry import Registry
from guidekit.testing.miniatures import flux_pipeline

pytestmark = pytest.mark.full
LAYOUT = guidekit.Condition(
    "a red circle and a blue square",
    segments=guidekit.Segment("red circle", (0.0, 0.0, 0.5, 1.0)),
)
# Nothing, a change of the output, and a block that is skipped at every step.
RIGHT = ((), ("apg", {}), ("slg", {"start": 0.0, "stop": 1.0}))
REFUSED = ("zest", "pww", "seg")


def draw(pipe, plugin=()):
    plugins = [Registry().make_guidance(*plugin)] if plugin else ()
    return guidekit.Sampling(pipe, LAYOUT, plugins, steps=2, cfg=3.0).finish().images


def rank(number, port, found):
    """One of two processes, each with half of the tokens."""
    torch.set_num_threads(1)
    world = {"RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in world.items()}
    torch.distributed.init_process_group("gloo")
    torch.accelerator.device_count = lambda: 1  # diffusers counts accelerators, and a CPU is none
    from diffusers import ContextParallelConfig

    pipe = flux_pipeline()
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    images = [draw(pipe, plugin) for plugin in RIGHT]
    refusals = []
    for plugin in REFUSED:
        try:
            draw(pipe, (plugin, {}))
            refusals.append("none")
        except guidekit.GuidekitError as error:
            refusals.append(str(error))
    found.put((torch.stack(images).numpy(), refusals))
    torch.distributed.destroy_process_group()


def test_two_devices_draw_the_image_of_one_and_refuse_what_they_cannot(unused_port):
    pipe = flux_pipeline()
    expected = torch.stack([draw(pipe, plugin) for plugin in RIGHT])
    fork = multiprocessing.get_context("fork")
    found = fork.Queue()
    ranks = [fork.Process(target=rank, args=(n, unused_port, found)) for n in (0, 1)]
    for process in ranks:
        process.start()
    both = [found.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join()
    assert not torch.allclose(expected[0], expected[2], atol=1e-3)
    for images, refusals in both:
        assert torch.allclose(torch.from_numpy(images), expected, atol=1e-5)
        assert all("spread over devices by enable_parallelism" in text for text in refusals)


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
