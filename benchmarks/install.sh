#!/usr/bin/env bash
# Builds the Go peer: install.sh PROGRAM. Installs Debian's Go and the sources of containerd's client where root may and they
# are missing; they come without modules, so the build needs no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
program=$1
sources=/usr/share/gocode/src/github.com/containerd/containerd

if ! command -v go >/dev/null || [ ! -d "$sources" ]; then
    echo "installing golang-go and golang-github-containerd-containerd-dev" >&2
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        golang-go golang-github-containerd-containerd-dev >/dev/null
fi
if [ ! -x "$program" ] || [ goclient/main.go -nt "$program" ]; then
    echo "building the Go peer" >&2
    mkdir -p "$(dirname "$program")"
    GO111MODULE=off GOFLAGS=-buildvcs=false GOPATH=/usr/share/gocode GOCACHE="$(dirname "$program")/go-cache" go build -o "$program" ./goclient
fi
