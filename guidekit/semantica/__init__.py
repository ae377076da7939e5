"""A pixel diffusion model that makes, from one picture, another with the same semantics.

Semantica: Kumar, Fischer, Greff, Weissenborn, Houlsby 2024, arXiv:2405.14857.
"""
