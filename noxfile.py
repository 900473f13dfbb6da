"""Runs the tests with each supported pair of PyTorch and torchvision: ``pip install nox && nox``; one pair: ``nox -s
"tests(2.6.0)"``; other Pythons: ``nox --force-python 3.12``."""

import nox

PAIRS = {"2.6.0": "0.21.0", "2.8.0": "0.23.0", "2.11.0": "0.26.0", "2.14.1": "0.29.1"}  # of torch and torchvision


@nox.session
@nox.parametrize("torch", list(PAIRS), ids=list(PAIRS))
def tests(session: nox.Session, torch: str) -> None:
    """The whole suite; arguments after ``--`` go to pytest."""
    session.install("-r", "requirements-test.txt", f"torch=={torch}", f"torchvision=={PAIRS[torch]}")
    session.run("python", "-m", "pytest", *session.posargs)
