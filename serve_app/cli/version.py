"""`t5-serve version`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import click

import serve_app


@click.command("version")
def command() -> None:
    """Print the versions of t5-serve, Ray, torch and transformers."""
    click.echo(f"t5-serve {serve_app.__version__}")
    for package in ("ray", "torch", "transformers"):
        try:
            # From the package's metadata: importing torch to ask it would take seconds.
            click.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            click.echo(f"{package} not installed")
