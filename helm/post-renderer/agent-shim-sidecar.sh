#!/bin/sh
# Helm post-renderer: the rendered manifests come in on stdin, and go out with the sidecar in the agent's pods.
# Needs kubectl or kustomize. Arguments, with --post-renderer-args:
#   --image IMAGE    where your clusters pull the sidecar from (default agent-shim:0.1.0)
#   --install HOW    chart (default) or manifest: how the agent takes its URL and token
#   --with-config    add the sidecar's ConfigMap, too: only where the chart agent-shim is not installed
set -eu

image=
how=chart
config=
while [ $# -gt 0 ]; do
  case $1 in
    --image) image=$2; shift 2 ;;
    --install) how=$2; shift 2 ;;
    --with-config) config=yes; shift ;;
    *) echo "agent-shim post-renderer: unknown argument $1" >&2; exit 2 ;;
  esac
done
case $how in
  chart|manifest) ;;
  *) echo "agent-shim post-renderer: --install is chart or manifest" >&2; exit 2 ;;
esac

here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if command -v kustomize >/dev/null 2>&1; then
  build="kustomize build"
elif command -v kubectl >/dev/null 2>&1; then
  build="kubectl kustomize"
else
  echo "agent-shim post-renderer: needs kubectl or kustomize" >&2
  exit 1
fi

cat >"$work/rendered.yaml"
if grep -Eq '^ *hostNetwork: *"?true' "$work/rendered.yaml"; then
  echo "agent-shim post-renderer: hostNetwork: there 127.0.0.1 is the whole node's; use the chart's gateway mode" >&2
  exit 1
fi
# Kustomize wants components below or beside its root, and no symbolic links out of it.
cp -RL "$here/components" "$work/components"
{
  echo "resources: [rendered.yaml]"
  echo "components:"
  echo "  - components/$how"
  [ -z "$config" ] || echo "  - components/config"
  if [ -n "$image" ]; then
    echo "patches:"
    echo "  - target: {kind: Deployment, name: '(.+-)?pipeops-agent'}"
    echo "    patch: |"
    echo "      - {op: replace, path: /spec/template/spec/initContainers/0/image, value: \"$image\"}"
  fi
} >"$work/kustomization.yaml"
$build "$work" >"$work/out.yaml"
if ! grep -q 'agent-shim/sidecar: enabled' "$work/out.yaml"; then
  echo "agent-shim post-renderer: no Deployment named pipeops-agent or ...-pipeops-agent in what Helm rendered" >&2
  exit 1
fi
cat "$work/out.yaml"
