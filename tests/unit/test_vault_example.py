"""The example of secrets is what the roles ask for, and what `ansible-vault` encrypts and Ansible reads."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from ansible.parsing.dataloader import DataLoader
from ansible.parsing.vault import VaultSecret

from tests.ansible_modules import encrypted

ANSIBLE = Path(__file__).parents[2] / "infra/ansible"
EXAMPLE = ANSIBLE / "inventories/site/group_vars/all/vault.yml.example"


def test_the_example_is_encrypted_and_read(tmp_path: Path) -> None:
    vault = tmp_path / "vault.yml"
    vault.write_bytes(encrypted(EXAMPLE.read_bytes(), b"a password"))
    assert b"secret" not in vault.read_bytes()
    loader = DataLoader()
    loader.set_vault_secrets([("default", VaultSecret(b"a password"))])
    read = loader.load_from_file(str(vault))
    assert set(read) == {"postgres_agentloop_password", "redaction_key", "backup_passphrase"}
    assert len(base64.b64decode(str(read["redaction_key"]), validate=True)) == 32
    named = "".join(path.read_text() for path in ANSIBLE.glob("roles/*/defaults/main.yml"))
    assert [name for name in read if not re.search(rf"\b{name}\b", named)] == []


def test_no_inventory_of_ours_holds_a_vault_that_is_not_encrypted() -> None:
    """`group_vars/all/vault.yml` of the example is the reader's own: only what ends in .example is here."""
    found = [path for path in ANSIBLE.glob("inventories/**/*vault*") if path.suffix != ".example"]
    assert found == []
