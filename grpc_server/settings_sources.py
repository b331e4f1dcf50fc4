"""Where a setting's value comes from: environment > file of a secret > `.env` > YAML > default.

The YAML file is named by `AGENTLOOP_CONFIG`. A secret may also be a file: `AGENTLOOP_DATABASE_URL_FILE`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
)

PREFIX = "AGENTLOOP_"


class SecretFiles(PydanticBaseSettingsSource):
    """Secrets named by `AGENTLOOP_<SECRET>_FILE`, without the file's last line end."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """The file's content if `field` is a secret and its variable is set."""
        variable = f"{PREFIX}{field_name.upper()}_FILE"
        path = os.environ.get(variable)
        if field.annotation is not SecretStr or not path:
            return None, field_name, False
        if os.environ.get(variable.removesuffix("_FILE")):
            raise ValueError(f"both {variable.removesuffix('_FILE')} and {variable} are set; set one")
        try:
            return Path(path).read_text(encoding="utf-8").rstrip("\r\n"), field_name, False
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{variable} names {path}, which cannot be read: {error}") from error

    def __call__(self) -> dict[str, Any]:
        """Every secret that is a file."""
        found = {
            name: self.get_field_value(field, name)[0]
            for name, field in self.settings_cls.model_fields.items()
        }
        return {name: value for name, value in found.items() if value is not None}


class YamlFile(PydanticBaseSettingsSource):
    """The YAML file that `AGENTLOOP_CONFIG` names; a key that is no setting is an error."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """The file's value of one setting."""
        del field
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Every setting in the file."""
        path = os.environ.get(f"{PREFIX}CONFIG")
        if not path:
            return {}
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{PREFIX}CONFIG names {path}, which cannot be read: {error}") from error
        if values is None:
            return {}
        if not isinstance(values, Mapping):
            raise ValueError(f"{path} is not a list of settings; write lines such as `parallel: 4`")
        unknown = sorted(str(key) for key in values if key not in self.settings_cls.model_fields)
        if unknown:
            raise ValueError(f"{path} sets {', '.join(unknown)}, which is no setting; see `config`")
        return dict(values)


def origins(settings: BaseSettings) -> dict[str, str]:
    """For each setting where its value came from: `environment`, `file`, `.env`, `yaml` or `default`."""
    kind = type(settings)
    sources: list[tuple[str, PydanticBaseSettingsSource]] = [
        ("environment", EnvSettingsSource(kind)),
        ("file", SecretFiles(kind)),
        (".env", DotEnvSettingsSource(kind)),
        ("yaml", YamlFile(kind)),
    ]
    values = [(name, source()) for name, source in sources]
    return {
        field: next((name for name, found in values if field in found), "default")
        for field in kind.model_fields
    }
