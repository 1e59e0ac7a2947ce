"""What the model hub refuses, or why it cannot be reached."""

from __future__ import annotations

import re

from recipe.doctor.case import Case
from recipe.doctor.rule import Rule
from recipe.doctor.scan import Mark

GATED = (
    "the hub asks for a licence",
    "GatedRepoError",
    "Cannot access gated repo",
    "You are trying to access a gated repo",
    "is not in the authorized list",
)


def accept(case: Case) -> str:
    for mark in GATED:
        for line in case.found(mark):
            if named := re.search(r"huggingface\.co/(?:api/models/)?([\w.-]+/[\w.-]+)", line.text):
                return f"accept the licence at https://huggingface.co/{named[1].rstrip('.')}, then set HF_TOKEN or `hf auth login`"
    return "accept the licence on the model's page, then set HF_TOKEN or `hf auth login`"


RULES = (
    Rule(
        "gated_model",
        "The model asks for a licence",
        "Its owner lets in only those who have accepted it, known by their token (403, or 401 without one).",
        accept,
        marks=GATED,
        over=("hub_not_found", "hub_forbidden", "no_token", "hub_unreachable", "request"),
        general_remedy="accept the licence on the model's page, then set HF_TOKEN or `hf auth login`",
    ),
    Rule(
        "no_token",
        "The hub does not know who asks",
        "No token was sent, or one that has expired (401).",
        "`hf auth login`, or HF_TOKEN=...; `hf auth whoami` says whether it is valid",
        marks=(
            "401 Client Error",
            "401 Unauthorized",
            "Client error '401",
            "Invalid user token",
            "Invalid username or password",
            "Token is required",
        ),
        over=("hub_not_found", "hub_unreachable"),
    ),
    Rule(
        "hub_forbidden",
        "The hub refuses this token",
        "The token is valid and may not see this model (403): fine-grained without the right, or the licence is not accepted.",
        "give the token read access to gated repositories, accept the licence on the model's page",
        marks=("403 Client Error", "403 Forbidden", "Client error '403"),
        over=("hub_unreachable",),
    ),
    Rule(
        "hub_not_found",
        "No such model, data set, file or revision on the hub",
        "A wrong name, or a private repository asked for without a token (404).",
        "check the spelling (org/name) and model.revision; set HF_TOKEN for a private one",
        marks=(
            "RepositoryNotFoundError",
            "RevisionNotFoundError",
            "EntryNotFoundError: 404",
            "is not a local folder and is not a valid model identifier",
            Mark(
                "no such model on the hub",
                r"no such model on the hub|no revision .* there, expected a commit",
            ),
        ),
        certainty="likely",
        over=("request",),
    ),
    Rule(
        "hub_unreachable",
        "The model hub cannot be reached",
        "No network, a proxy, or a container that has none by design (only `make prepare` has).",
        "`curl -I https://huggingface.co`; set HTTPS_PROXY or HF_ENDPOINT (a mirror); run `make prepare` first; or set model.id "
        "to a folder that holds the checkpoint",
        marks=(
            Mark("We couldn't connect to", r"We couldn't connect to 'https?://"),
            "the hub could not be reached",
            "LocalEntryNotFoundError",
            "this container has no network, by design",
            # Other services, trackers of experiments for one, fail with the same words.
            Mark(
                "Max retries exceeded with url",
                r"huggingface\.co|hf\.co|/resolve/|url: /api/(models|datasets)/",
            ),
            "OfflineModeIsEnabled",
            Mark("Cannot reach", r"Cannot reach https?://"),
            Mark("no bytes of", r"no bytes of .* for \d+ s, over plain HTTP too"),
        ),
        certainty="likely",
        over=("missing_file", "request", "peer_lost"),
    ),
    Rule(
        "hub_certificate",
        "The hub's certificate was not accepted",
        "A proxy between signs with its own certificate, or the clock is wrong.",
        "SSL_CERT_FILE and REQUESTS_CA_BUNDLE = the proxy's bundle; `timedatectl`",
        marks=("CERTIFICATE_VERIFY_FAILED",),
        over=("hub_unreachable",),
    ),
    Rule(
        "hub_rate_limit",
        "The hub asks to wait",
        "Too many requests from this address (429).",
        "wait some minutes, set HF_TOKEN (its limits are higher), go on with the same command",
        marks=("429 Client Error", "429 Too Many", "Client error '429"),
        over=("hub_unreachable",),
    ),
)
