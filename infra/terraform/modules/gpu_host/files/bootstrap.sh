#!/bin/bash
# Brings this host up: fetches Ansible, the roles and the release, and plays them on itself. Safe to run again.
# Put there by cloud-init. Secrets come from Secrets Manager into memory (/run), and go when it ends.
set -euo pipefail
facts="${FACTS:-/etc/agentloop-host/facts.json}"
home="${HOME_OF_BUNDLE:-/opt/agentloop-host}"
state="${STATE:-/var/lib/agentloop-host}"
memory="${MEMORY:-/run/agentloop-host}"
models="${MODELS:-/var/lib/agentloop}"
imds="${IMDS:-http://169.254.169.254}"

say() { echo "agentloop-bootstrap: $*"; }

# Terraform's facts as variables: aws_region, aws_bucket …
known="$(python3 -c 'import json, shlex, sys
for name, value in json.load(open(sys.argv[1])).items(): print(f"{name}={shlex.quote(str(value))}")' "$facts")"
eval "$known"

# What AWS tells this instance about itself; a session's token comes first (IMDSv2).
itself="$(python3 - "$imds/latest" <<'PYTHON'
import shlex, sys
from urllib.request import ProxyHandler, Request, build_opener
def ask(path, method, **headers):
    headers = {f"X-aws-ec2-metadata-{name.replace('_', '-')}": value for name, value in headers.items()}
    request = Request(f"{sys.argv[1]}/{path}", method=method, headers=headers)
    return build_opener(ProxyHandler({})).open(request, timeout=5).read().decode()
token = ask("api/token", "PUT", token_ttl_seconds="60")
for name, path in (("instance", "instance-id"), ("address", "local-ipv4")):
    print(f"{name}={shlex.quote(ask('meta-data/' + path, 'GET', token=token))}")
PYTHON
)"
eval "$itself"

export AWS_DEFAULT_REGION="$aws_region"
bucket="s3://$aws_bucket"
release="agentloop-$aws_release.tar"
bundle="agentloop-ansible-$aws_bundle.tar"

say "fetches $bundle and $release from $bucket"
mkdir -p "$home" "$state" "$models/blue/models/versions"
aws s3 cp --only-show-errors "$bucket/releases/$bundle" "$home/$bundle"
aws s3 cp --only-show-errors "$bucket/releases/$release" "$home/$release"
aws s3 cp --only-show-errors "$bucket/models/base.gguf" "$home/base.gguf"
# The models that others have: a route may name any of them.
aws s3 sync --only-show-errors "$bucket/models/versions" "$models/blue/models/versions"

rm -rf "$home/bundle" "$home/inventory"
mkdir -p "$home/bundle" "$home/inventory"
tar --extract --file "$home/$bundle" --directory "$home/bundle"
python3 -m venv --clear "$home/venv"
(cd "$home/bundle" && "$home/venv/bin/pip" install --quiet --no-index --no-deps --require-hashes --no-cache-dir \
  --disable-pip-version-check --find-links=wheels --requirement=requirements.txt)

ln -s ../bundle/ansible/inventories/aws/group_vars "$home/inventory/group_vars"
cat >"$home/inventory/hosts.yml" <<YAML
servers:
  hosts:
    "$instance.$aws_environment.agentloop.internal":
      ansible_connection: local
      ansible_host: "$address"
      ansible_python_interpreter: /usr/bin/python3
YAML

(umask 077 && mkdir -p "$memory")
trap 'rm -f "$memory/secrets.json"' EXIT
(umask 077 && aws secretsmanager get-secret-value --secret-id "$aws_secret" --query SecretString --output text >"$memory/secrets.json")

say "plays the roles"
ANSIBLE_CONFIG="$home/bundle/ansible/ansible.cfg" ANSIBLE_NOCOLOR=1 ANSIBLE_HOME="$home/ansible" HOME="$home" \
  "$home/venv/bin/ansible-playbook" "$home/bundle/ansible/playbooks/host.yml" --inventory "$home/inventory/hosts.yml" \
  --extra-vars "@$facts" --extra-vars "@$memory/secrets.json" \
  --extra-vars "{\"release\": \"$home/$release\", \"server_base_gguf\": \"$home/base.gguf\"}"

rm -f "$home/base.gguf" "$home/$bundle"
touch "$state/up"
# Nobody waits where the hook is younger than the host: then this says no, and nothing is lost.
aws autoscaling complete-lifecycle-action --lifecycle-action-result CONTINUE --instance-id "$instance" \
  --lifecycle-hook-name "$aws_up_hook" --auto-scaling-group-name "$aws_group" ||
  say "no lifecycle action waited for this host"
say "is up"
