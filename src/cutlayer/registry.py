"""Cases by name: one instance per class, and one error text that lists the known names."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from cutlayer.errors import ConfigError

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to instances; the error for an unknown name lists the known ones."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: one instance of the class becomes known under `name`."""

        def add(cls: type[T]) -> type[T]:
            assert name not in self._entries, f"{self._what} {name!r} is registered twice"
            self._entries[name] = cls()
            return cls

        return add

    def get(self, name: str) -> T:
        """The entry called `name`.

        Raises:
            ConfigError: nothing has that name.
        """
        if name not in self._entries:
            known = ", ".join(self)
            raise ConfigError(f"no {self._what} is called {name!r}; known: {known}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries
