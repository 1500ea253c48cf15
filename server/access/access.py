"""Who may use the server: its API keys, and what each has used of its limits."""

from collections.abc import Mapping
from dataclasses import dataclass

from server.access.keys import Keys, read_keys
from server.access.quotas import Account
from server.settings import Settings


@dataclass(frozen=True, slots=True)
class Access:
    """The accepted keys and an account for each, by its name."""

    keys: Keys
    accounts: Mapping[str, Account]

    @classmethod
    def read(cls, settings: Settings) -> "Access":
        """The keys that the settings give. Raises BadSetting."""
        keys = read_keys(settings.api_keys, settings.api_keys_file)
        return cls(keys, {name: Account(name, limits) for name, limits in keys.limits.items()})
