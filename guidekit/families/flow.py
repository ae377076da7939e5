"""Steps of flow models whose shift depends on the size of the picture."""

from diffusers.pipelines.flux.pipeline_flux import calculate_shift


def dynamic_shift(scheduler, tokens: int, max_shift: float) -> float:
    """`mu` for pictures of so many image tokens, from the scheduler's config.

    max_shift: the pipeline's own default, for configs without it.
    """
    config = scheduler.config
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )
