#!/usr/bin/env bash
# Tells the SuperLink behind CONNECTION to let in the node that holds PUBLIC_KEY's private key.
set -euo pipefail
shopt -s inherit_errexit

fail() {
    echo "$0: $*" >&2
    exit 1
}

if [[ $# -ne 3 ]]; then
    echo "usage: $0 PUBLIC_KEY CONNECTION NAME" >&2
    exit 2
fi
readonly PUBLIC_KEY=$1 CONNECTION=$2 NAME=$3
here=$(dirname "$0")
flwr=$(command -v flwr) || fail "flwr is not on the PATH; activate the environment that feddm is installed in"
python=$(dirname "$flwr")/python

# A private key would be accepted by ssh-keygen, and has no business here.
[[ -r $PUBLIC_KEY && $(head -c 20 "$PUBLIC_KEY") == "ecdsa-sha2-nistp384 " ]] ||
    fail "$PUBLIC_KEY is not a public key by make-node-key.sh (ecdsa-sha2-nistp384 ...)"
fingerprint=$(ssh-keygen -l -f "$PUBLIC_KEY" | cut -d' ' -f2)

nodes=$("$python" "$here/list_nodes.py" "$CONNECTION")
read -r id status < <(awk -v key="$fingerprint" '$3 == key { print $1, $2 }' <<<"$nodes") || true
if [[ ${status-} == unregistered ]]; then
    fail "this key was unregistered (node $id), and Flower takes none twice; make-node-key.sh makes a new one under a new name"
elif [[ -n ${id-} ]]; then
    echo "SuperNode $id was registered before: $NAME with $fingerprint"
    exit 0
fi
# Elsewhere Flower takes the name of a connection for a path, where an app lies in a folder of that name.
key=$(realpath "$PUBLIC_KEY")
(cd "$here" && "$flwr" supernode register "$key" "$CONNECTION" --name "$NAME")
echo "it is $NAME with $fingerprint"
