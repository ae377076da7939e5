"""Tiny pipelines of the transformer families; see guidekit.testing.miniatures."""

from guidekit.testing.miniatures import dit_pipeline, flux_pipeline, pixart_pipeline, sd3_pipeline

__all__ = ["dit_pipeline", "flux_pipeline", "pixart_pipeline", "sd3_pipeline"]
