# The image that `make build` makes: Debian, the locked Python packages, the recipe. Built without network: Debian
# packages (context `debs`) and wheels (context `wheels`) are fetched and hash-checked before (scripts/image.py).
# CUDA and NCCL come with torch's wheels, the driver comes from the host.

# Debian, by digest; or `local`, what `make base` has made of image/debian.lock.
ARG BASE=local

FROM scratch AS local
ADD build/image/base.tar /

FROM ${BASE} AS bootstrap
ARG BASE=local
RUN --network=none \
    --mount=type=bind,source=image/install-debian,target=/dev/install-debian \
    --mount=type=bind,from=debs,target=/dev/debs \
    sh /dev/install-debian "$BASE" /dev/debs

# One layer, without what was overwritten on the way.
FROM scratch AS system
COPY --from=bootstrap / /

FROM system AS packages
ARG FLAVOUR
ARG SOURCE_DATE_EPOCH
RUN --network=none \
    --mount=type=bind,source=image/install-packages,target=/dev/install-packages \
    --mount=type=bind,from=wheels,target=/dev/wheels \
    sh /dev/install-packages "$FLAVOUR" /dev/wheels/run /opt/venv
COPY LICENSE requirements-*.lock /opt/recipe/
COPY recipe /opt/recipe/recipe
# Times and modes are those of a clone, which differ from one to the next.
RUN --network=none \
    chmod -R u=rwX,go=rX /opt/recipe \
    && find /opt/recipe -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} + \
    && echo /opt/recipe >/opt/recipe.pth \
    && PYTHONHASHSEED=0 python3 -m compileall -q --invalidation-mode unchecked-hash /opt/recipe

# The software bill of materials, which lies beside the image: what pip and dpkg say is installed.
FROM packages AS listing
RUN --network=none \
    --mount=type=bind,from=wheels,target=/dev/wheels \
    python3 -m venv --without-pip /opt/bom \
    && python3 -I "$(echo /dev/wheels/run/pip-*.whl)/pip" --python /opt/bom/bin/python install --quiet --no-index \
       --find-links /dev/wheels/bom --no-deps --require-hashes -r /dev/wheels/bom/requirements.txt \
    && mkdir /listing \
    && /opt/bom/bin/cyclonedx-py environment --output-reproducible --output-file /listing/python.json /opt/venv/bin/python \
    && dpkg-query --show --showformat '${Package} ${Version} ${Architecture}\n' >/listing/debian.txt

FROM scratch AS bom
COPY --from=listing /listing /

FROM system AS image
COPY --from=packages /opt/venv /opt/venv
COPY --from=packages /opt/recipe /opt/recipe
COPY --from=packages /opt/recipe.pth /opt/venv/lib/python3.11/site-packages/recipe.pth
ARG VERSION
ARG REVISION
ARG LOCK
ARG SOURCES
LABEL org.opencontainers.image.title="qlora-70b-recipe" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      recipe.lock="$LOCK" \
      recipe.sources="$SOURCES"
# PYTHONSAFEPATH: a folder named recipe/ in the working directory is not the one that runs.
ENV PATH=/opt/venv/bin:/usr/bin:/bin \
    LANG=C.UTF-8 \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RECIPE_COMMIT="$REVISION" \
    HOME=/cache \
    USER=recipe \
    LOGNAME=recipe \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton
WORKDIR /checkout
USER 1000:1000
ENTRYPOINT ["/usr/bin/tini", "--", "/opt/venv/bin/python", "-m", "recipe"]
CMD ["preflight", "--config", "/opt/recipe/recipe/configs/llama-3.1-70b.yaml"]
