"""Temporary."""
from .meter import AngularVelocity
from .reading import Reading
