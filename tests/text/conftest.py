"""Fixtures of the tests of chats."""

from byte_tokenizer import byte_tokenizer  # noqa: F401 - a fixture
