"""Measures of guided images."""
