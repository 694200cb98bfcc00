#!/usr/bin/env bash
# Put secrets of a cloud's store into the environment of the shell that reads this file, before it starts Ray:
#   . cluster/secrets.sh aws:us-west-2 WANDB_API_KEY=orpo-ray/wandb      a region, and names in AWS Secrets Manager
#   . cluster/secrets.sh gcp WANDB_API_KEY=orpo-ray-wandb                names in the Secret Manager of the node's project
#   . cluster/secrets.sh azure:my-vault WANDB_API_KEY=wandb              a key vault, and names in it
# The node reads them by its role. A secret that it cannot read leaves its variable unset, and a warning in one line.

_secret_of() { # CLOUD PLACE NAME: print the secret
  case "$1" in
    aws)
      python -c 'import sys, boto3; store = boto3.client("secretsmanager", sys.argv[1])
print(store.get_secret_value(SecretId=sys.argv[2])["SecretString"])' "$2" "$3"
      ;;
    gcp) gcloud secrets versions access latest --secret="$3" ;;
    azure)
      python -c 'import sys; from azure.identity import ManagedIdentityCredential; from azure.keyvault.secrets import SecretClient
store = SecretClient(f"https://{sys.argv[1]}.vault.azure.net", ManagedIdentityCredential())
print(store.get_secret(sys.argv[2]).value)' "$2" "$3"
      ;;
    *) echo "unknown store $1: use aws, gcp or azure" >&2 && return 1 ;;
  esac
}

_secrets() {
  local store="$1" each variable value complaint
  complaint="$(mktemp)"
  shift
  for each in "$@"; do
    variable="${each%%=*}"
    if value="$(_secret_of "${store%%:*}" "${store#*:}" "${each#*=}" 2>"$complaint")" && [[ -n "$value" ]]; then
      export "$variable=$value"
    else
      echo "warning: $variable is not set on this node: secret ${each#*=}: $(tail -n 1 "$complaint")" >&2
    fi
  done
  rm -f "$complaint"
}

_secrets "$@"
