#!/bin/sh
# Helm post-renderer: the rendered manifests come in on stdin, and go out with the sidecar in the agent's pods.
# Needs kubectl or kustomize. Arguments, with --post-renderer-args:
#   --image IMAGE    where your clusters pull the sidecar from; required
#   --install HOW    chart (default) or manifest: how the agent takes its URL and token
#   --with-config    add the sidecar's ConfigMap, too: only where the chart agent-shim is not installed
set -eu

image=
how=chart
config=
while [ $# -gt 0 ]; do
  case $1 in
    --image) image=${2-}; shift; shift $(($# > 0)) ;;
    --install) how=${2-}; shift; shift $(($# > 0)) ;;
    --with-config) config=yes; shift ;;
    *) echo "agent-shim post-renderer: unknown argument $1" >&2; exit 2 ;;
  esac
done
case $how in
  chart|manifest) ;;
  *) echo "agent-shim post-renderer: --install is chart or manifest" >&2; exit 2 ;;
esac
# A native sidecar whose image cannot be pulled keeps the agent from starting.
if ! printf '%s' "$image" | grep -Eq '^[A-Za-z0-9._:@/-]+$' || [ "${image#*://}" != "$image" ]; then
  echo "agent-shim post-renderer: --image must say where your clusters pull the sidecar from" >&2
  exit 2
fi

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
# The components know the agent's Deployment by its label. Where Helm rendered several Deployments, the replacement that moves
# the agent's URL needs its name, and Kustomize selects a source by nothing else.
agent=$(awk '
  { sub(/\r$/, "") }
  function done() { if (kind && label && name) print name; kind = label = name = "" }
  /^---/ { done() }
  /^kind: *Deployment *$/ { kind = 1 }
  /^metadata:/ { inside = 1; next }
  /^[^ #]/ { inside = 0 }
  inside && /^  name:/ { name = $2; gsub(/["'"'"']/, "", name) }
  inside && /^    app.kubernetes.io\/name: *["'"'"']?pipeops-agent["'"'"']? *$/ { label = 1 }
  END { done() }' "$work/rendered.yaml")
if [ "$how" = chart ]; then
  if [ "$(printf '%s\n' "$agent" | wc -w)" -ne 1 ]; then
    echo "agent-shim post-renderer: one Deployment labelled app.kubernetes.io/name=pipeops-agent is expected in what Helm" \
      "rendered; found: ${agent:-none}" >&2
    exit 1
  fi
  sed -i "s/^\\( *\\)kind: Deployment\$/&\\n\\1name: '$agent'/" "$work/components/chart/sidecar/kustomization.yaml"
  selector="labelSelector: app.kubernetes.io/name=pipeops-agent"
else
  selector="name: '(.+-)?pipeops-agent'"
fi
{
  echo "resources: [rendered.yaml]"
  echo "components:"
  echo "  - components/$how"
  [ -z "$config" ] || echo "  - components/config"
  echo "patches:"
  if [ -n "$config" ]; then
    # Helm puts it into the release's namespace, as it does with the agent.
    echo "  - target: {kind: ConfigMap, name: agent-shim}"
    echo "    patch: |"
    echo "      - {op: remove, path: /metadata/namespace}"
  fi
  echo "  - target: {kind: Deployment, $selector}"
  echo "    patch: |"
  echo "      - {op: replace, path: /spec/template/spec/initContainers/0/image, value: \"$image\"}"
} >"$work/kustomization.yaml"
$build "$work" >"$work/out.yaml"
if ! grep -q 'agent-shim/sidecar: enabled' "$work/out.yaml"; then
  echo "agent-shim post-renderer: no Deployment of the agent in what Helm rendered" >&2
  exit 1
fi
cat "$work/out.yaml"
