"""One guided step: branches, denoiser calls, energies, one backward per push rule."""
