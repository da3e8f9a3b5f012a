"""Metadata lives in pyproject.toml; native extensions will be declared here."""

from setuptools import setup

setup()
