# The images of weightsync. `make images` builds them with docker, podman or buildah; docs/images.md has the rest.
#
#   target     what it is                                          starts as
#   operator   the operator                                        python -m weightsync_operator
#   agent      the sidecar of trainers and inference pods          python -m weightsync_engine.agent
#   vllm       a vLLM image with weightsync's plugin and guard     as its base does
#
# All run as user 65532, write nowhere but /tmp, /run/weightsync and /var/lib/weightsync, and need no capability.
#
#   argument   what it names
#   BASE       Debian or Ubuntu with Python 3.11 to 3.13 and venv; for a release with its digest
#   VLLM_BASE  the vLLM image that the target vllm is made from; for a release with its digest
#   TORCH      torch of the agent: cuda (PyPI's, any index), cpu (a tenth of it; pip's configuration has to name
#              PyTorch's index of CPU builds), none (mount one at /opt/torch)
#   VERSION    has to be the sources' version: the build fails where it is another
#   REVISION   commit that the image is made from
#
# Two optional secrets reach pip, and no image: `pip` is its configuration file, `ca` a bundle of certificates, to
# be named there as /run/secrets/ca.

ARG BASE=python:3.13-slim-trixie
ARG VLLM_BASE=vllm/vllm-openai:v0.32.0

# ---- what builds; nothing of it gets into an image but what is copied by name

FROM ${BASE} AS tools
ENV PIP_CONFIG_FILE=/run/secrets/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements/build.txt requirements/
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    python3 -m venv /build \
    && /build/bin/pip install --quiet --no-deps --require-hashes --only-binary :all: -r requirements/build.txt

FROM tools AS wheels
ARG VERSION=0.1.0
COPY contract contract
COPY engine engine
COPY operator operator
RUN /build/bin/pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir /wheels \
        ./contract ./engine ./operator \
    && for name in contract engine operator; do \
        test -f "/wheels/weightsync_$name-$VERSION-py3-none-any.whl" \
        || { echo "VERSION=$VERSION, but the sources are: $(ls /wheels)" >&2; exit 1; }; \
    done

# ---- the root of operator and agent: BASE without what serves to change it, in one layer

FROM ${BASE} AS stripped
# Every module gets its bytecode now: nothing can be written later, and its sources never change.
RUN stdlib=$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))') \
    && rm -rf /usr/local/lib/python3*/site-packages/* /usr/local/bin/pip* /usr/share/python-wheels \
        "$stdlib"/config-* "$stdlib"/ensurepip "$stdlib"/idlelib "$stdlib"/lib2to3 "$stdlib"/pydoc_data \
        "$stdlib"/test "$stdlib"/tkinter "$stdlib"/turtledemo \
        /usr/local/include /usr/include /usr/share/locale /usr/share/man /usr/share/info /usr/share/lintian \
        /var/cache/* /var/lib/apt/lists/* /var/log/* \
    && find /usr/share/doc -type f ! -name copyright -delete \
    && find / -xdev -type f -perm /6000 -exec chmod ug-s {} + \
    && python3 -m compileall -q -f --invalidation-mode unchecked-hash "$stdlib" \
    && mkdir -p /run/weightsync /var/lib/weightsync \
    && chown 65532:65532 /run/weightsync /var/lib/weightsync \
    && echo 'weightsync:x:65532:' >> /etc/group \
    && echo 'weightsync:x:65532:65532:weightsync:/tmp:/usr/sbin/nologin' >> /etc/passwd

FROM scratch AS root
COPY --from=stripped / /
ENV PATH=/opt/weightsync/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1
WORKDIR /tmp
COPY LICENSE NOTICE /licenses/

# ---- operator

FROM tools AS operator-venv
COPY requirements/operator.txt requirements/
# A third of it all would be kubernetes' client once more, for asyncio, which nothing here imports.
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    python3 -m venv --without-pip /opt/weightsync \
    && /build/bin/pip --python /opt/weightsync/bin/python install --quiet --no-deps --require-hashes \
        --only-binary :all: --no-compile -r requirements/operator.txt \
    && rm -r /opt/weightsync/lib/python3*/site-packages/kubernetes/aio \
    && python3 -m compileall -q -f --invalidation-mode unchecked-hash /opt/weightsync/lib
COPY --from=wheels /wheels /wheels
RUN /build/bin/pip --python /opt/weightsync/bin/python install --quiet --no-index --no-deps --no-compile \
        /wheels/weightsync_contract-*.whl /wheels/weightsync_operator-*.whl \
    && /build/bin/pip --python /opt/weightsync/bin/python check \
    && python3 -m compileall -q -f --invalidation-mode unchecked-hash /opt/weightsync/lib/python3*/*/weightsync_*

FROM root AS operator
ARG BASE
ARG VERSION=0.1.0
ARG REVISION=unknown
COPY --from=operator-venv /opt/weightsync /opt/weightsync
LABEL org.opencontainers.image.title="weightsync operator" \
      org.opencontainers.image.description="Keeps fleets of inference pods on their trainers' newest weights" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"
USER 65532:65532
ENTRYPOINT ["python", "-m", "weightsync_operator"]

# ---- agent

FROM tools AS torch
ARG TORCH=cuda
COPY requirements/torch-cpu.txt requirements/torch-cuda.txt requirements/torch-deps.txt requirements/
# Headers serve those who compile against torch.
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    mkdir /opt/torch \
    && case "$TORCH" in \
    none) ;; \
    cpu|cuda) \
        /build/bin/pip install --quiet --no-deps --require-hashes --only-binary :all: --no-compile \
            --target /opt/torch -r "requirements/torch-$TORCH.txt" \
        && rm -rf /opt/torch/bin /opt/torch/torch/include /opt/torch/torch/share \
            /opt/torch/nvidia/*/include \
        && python3 -m compileall -q -f --invalidation-mode unchecked-hash -x testing/_internal /opt/torch \
        && PYTHONPATH=/opt/torch python3 -c 'import torch.distributed; assert torch.distributed.is_gloo_available()' ;; \
    *) echo "TORCH=$TORCH is none of cpu, cuda, none" >&2; exit 1 ;; \
    esac

FROM tools AS agent-venv
COPY requirements/agent.txt requirements/
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    python3 -m venv --without-pip /opt/weightsync \
    && /build/bin/pip --python /opt/weightsync/bin/python install --quiet --no-deps --require-hashes \
        --only-binary :all: --no-compile -r requirements/agent.txt \
    && echo /opt/torch > "$(echo /opt/weightsync/lib/python3*/site-packages)/torch.pth" \
    && python3 -m compileall -q -f --invalidation-mode unchecked-hash /opt/weightsync/lib
COPY --from=wheels /wheels /wheels
RUN /build/bin/pip --python /opt/weightsync/bin/python install --quiet --no-index --no-deps --no-compile \
        /wheels/weightsync_contract-*.whl /wheels/weightsync_engine-*.whl \
    && /build/bin/pip --python /opt/weightsync/bin/python check \
    && python3 -m compileall -q -f --invalidation-mode unchecked-hash /opt/weightsync/lib/python3*/*/weightsync_*

FROM root AS agent
ARG BASE
ARG VERSION=0.1.0
ARG REVISION=unknown
# The largest layer comes first: a new version of ours leaves it as it is.
COPY --from=torch /opt/torch /opt/torch
COPY --from=agent-venv /opt/weightsync /opt/weightsync
LABEL org.opencontainers.image.title="weightsync agent" \
      org.opencontainers.image.description="Sidecar of trainers and inference engines: moves weights, decides who may answer" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"
USER 65532:65532
ENTRYPOINT ["python", "-m", "weightsync_engine.agent"]

# ---- vLLM with the plugin

# pip itself comes along for that one step: a vLLM image may have none.
FROM wheels AS carried
COPY requirements/plugin.txt /carried/
RUN mkdir /carried/pip && cp -r /build/lib/python3*/site-packages/pip /carried/pip/ \
    && cp /wheels/weightsync_contract-*.whl /wheels/weightsync_engine-*.whl /carried/

FROM ${VLLM_BASE} AS vllm
ARG VLLM_BASE
ARG VERSION=0.1.0
ARG REVISION=unknown
USER 0:0
# With --no-deps: vLLM's own packages stay as vLLM pins them.
RUN --mount=type=secret,id=pip --mount=type=secret,id=ca \
    --mount=type=bind,from=carried,source=/carried,target=/carried \
    export PYTHONPATH=/carried/pip PYTHONDONTWRITEBYTECODE=1 PIP_CONFIG_FILE=/run/secrets/pip PIP_NO_CACHE_DIR=1 \
        PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    && python3 -m pip install --quiet --no-deps --require-hashes --only-binary :all: -r /carried/plugin.txt \
    && python3 -m pip install --quiet --no-index --no-deps /carried/*.whl \
    && mkdir -p /run/weightsync /var/lib/weightsync \
    && chown 65532:65532 /run/weightsync /var/lib/weightsync \
    && echo 'weightsync:x:65532:' >> /etc/group \
    && echo 'weightsync:x:65532:65532:weightsync:/tmp:/usr/sbin/nologin' >> /etc/passwd
# Caches of vLLM, torch and the model hub go to HOME.
ENV HOME=/tmp
LABEL org.opencontainers.image.title="vLLM with weightsync" \
      org.opencontainers.image.description="A vLLM server that takes new weights from weightsync's agent" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${VLLM_BASE}"
USER 65532:65532
