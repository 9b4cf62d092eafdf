#!/bin/sh
# Writes go.mod and go.sum anew: update.sh [KUBERNETES_VERSION [KWOK_VERSION [COREDNS_VERSION]]], with the pinned ones
# by default.
#
# k8s.io/kubernetes can't be required as it is: it replaces its staging modules (k8s.io/api and some thirty more)
# by folders of its own tree, and replacements don't reach a module that requires it. Their published versions
# have the same number with 0 for the major, and replace them here.
set -eu
cd "$(dirname "$0")"
pinned() { sed -n -E "s#^[[:space:]]*(require )?$1 v([0-9.]+).*#\2#p" go.mod | head -n 1; }
kubernetes=${1:-$(pinned k8s.io/kubernetes)}
kwok=${2:-$(pinned sigs.k8s.io/kwok)}
coredns=${3:-$(pinned github.com/coredns/coredns)}
staging=v0.${kubernetes#1.}

upstream=$(cd / && go mod download -json "k8s.io/kubernetes@v$kubernetes" | sed -n -E 's/.*"GoMod": "(.*)".*/\1/p')
{
    echo "module weightsync.dev/tests/cluster"
    echo
    grep -E '^go ' "$upstream"
    echo
    grep -E '^godebug ' "$upstream"
    echo
    echo "require ("
    echo "	github.com/coredns/coredns v$coredns"
    echo "	k8s.io/kubernetes v$kubernetes"
    echo "	sigs.k8s.io/kwok v$kwok"
    echo ")"
    echo
    echo "replace ("
    sed -n -E 's#^[[:space:]]+(k8s\.io/[a-z0-9-]+) => \./staging/src/.*#	\1 => \1 '"$staging"'#p' "$upstream"
    echo ")"
} > go.mod.new
mv go.mod.new go.mod
rm -f go.sum
go mod tidy
