#!/usr/bin/env bash
# Adds [superlink.NAME] to Flower's configuration ($FLWR_HOME/config.toml), so that
# `flwr run APP NAME` and its like reach the SuperLink. Other connections stay as they are.
set -euo pipefail
shopt -s inherit_errexit
umask 077

fail() {
    echo "$0: $*" >&2
    exit 1
}

if [[ $# -ne 3 ]]; then
    echo "usage: $0 NAME HOST:PORT ROOT_CERTIFICATE" >&2
    exit 2
fi
readonly NAME=$1 ADDRESS=$2
[[ $NAME =~ ^[A-Za-z0-9_-]+$ ]] || fail "NAME must consist of letters, digits, '_' and '-', got '$NAME'"
[[ $ADDRESS =~ ^[][A-Za-z0-9.:-]+:[0-9]+$ ]] || fail "HOST:PORT is needed, without https://, got '$ADDRESS'"
openssl x509 -in "$3" -noout || fail "ROOT_CERTIFICATE must be a certificate in PEM format, got '$3'"
ROOT_CERTIFICATE=$(realpath "$3")
readonly ROOT_CERTIFICATE
[[ $ROOT_CERTIFICATE != *[\"\\]* ]] || fail "the path of ROOT_CERTIFICATE must hold no quotes and no backslashes"
readonly CONFIG=${FLWR_HOME:-$HOME/.flwr}/config.toml

section="[superlink.$NAME]
address = \"$ADDRESS\"
root-certificates = \"$ROOT_CERTIFICATE\""
mkdir -p "$(dirname "$CONFIG")"
touch "$CONFIG"
if grep -qE "^\[superlink\.\"?$NAME\"?\]" "$CONFIG"; then
    found=$(grep -A2 -F "[superlink.$NAME]" "$CONFIG") || true
    [[ $found == "$section" ]] ||
        fail "$CONFIG has another [superlink.$NAME]; nothing was changed. Use another name or edit that section"
    echo "kept [superlink.$NAME] in $CONFIG"
    exit 0
fi
printf '\n%s\n' "$section" >>"$CONFIG"
echo "added [superlink.$NAME] to $CONFIG"
