{{/*
The agent, once: the policy and examples/on-a-cluster/sidecar both are made of these. Whatever differs from pod to pod
comes by fieldRef, so that nothing here has to be computed at admission.
*/}}

{{- define "weightsync.agent" -}}
name: weightsync-agent
image: {{ include "weightsync.image" (list . .Values.agent.image) }}
imagePullPolicy: {{ .Values.agent.image.pullPolicy }}
restartPolicy: Always
env:
  - name: WEIGHTSYNC_ROLE
    valueFrom: {fieldRef: {fieldPath: "metadata.labels['weightsync.dev/role']"}}
  - name: WEIGHTSYNC_OPERATOR
    value: wss://{{ include "weightsync.host" . }}:8443
  - name: WEIGHTSYNC_OPERATOR_CA
    value: /var/run/secrets/weightsync.dev/ca/ca.crt
  - name: WEIGHTSYNC_TOKEN_FILE
    value: /var/run/secrets/weightsync.dev/token/token
  # Empty where the pod has no such annotation, which is to the agent as if it were not given.
  - name: WEIGHTSYNC_ENGINE_URL
    valueFrom: {fieldRef: {fieldPath: "metadata.annotations['weightsync.dev/engine-url']"}}
  - name: WEIGHTSYNC_LIMIT_RATE
    valueFrom: {fieldRef: {fieldPath: "metadata.annotations['weightsync.dev/limit-rate']"}}
  - name: WEIGHTSYNC_DIR
    value: /run/weightsync
  - name: WEIGHTSYNC_STATE_DIR
    value: /var/lib/weightsync
  - name: WEIGHTSYNC_HEALTH_PORT
    value: {{ .Values.agent.healthPort | int64 | toString | quote }}
  - name: WEIGHTSYNC_LOG_FORMAT
    value: {{ .Values.agent.logFormat }}
  {{- include "weightsync.podEnv" . | nindent 2 }}
  - name: POD_UID
    valueFrom: {fieldRef: {fieldPath: metadata.uid}}
  {{- with .Values.agent.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
ports:
  - {name: weightsync, containerPort: {{ .Values.agent.healthPort | int64 }}, protocol: TCP}
# The pod's other containers start once it answers, and find its sockets and its token.
startupProbe:
  httpGet: {path: /healthz, port: weightsync}
  periodSeconds: 1
  timeoutSeconds: 5
  failureThreshold: 120
# Ready means that a request to this pod will be answered: Services leave a pod alone before it has the version.
readinessProbe:
  httpGet: {path: /readyz, port: weightsync}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
livenessProbe:
  httpGet: {path: /healthz, port: weightsync}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
{{- with .Values.agent.resources }}
resources: {{- toYaml . | nindent 2 }}
{{- end }}
# No runAsUser: it has to be the user of the container that it serves, which the pod's securityContext says.
securityContext: {{- include "weightsync.restricted" . | nindent 2 }}
volumeMounts:
  - {name: weightsync-run, mountPath: /run/weightsync}
  - {name: weightsync-state, mountPath: /var/lib/weightsync}
  - {name: weightsync-tmp, mountPath: /tmp}
  # Not below /var/run/weightsync: that is /run/weightsync in most images, which the other container writes to.
  - {name: weightsync-token, mountPath: /var/run/secrets/weightsync.dev/token, readOnly: true}
  - {name: weightsync-ca, mountPath: /var/run/secrets/weightsync.dev/ca, readOnly: true}
  {{- with .Values.agent.volumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* The volumes of a pod with an agent. */}}
{{- define "weightsync.agentVolumes" -}}
- name: weightsync-run
  emptyDir: {}
# On disk, not in memory: the journal has to outlive the agent, and a trainer keeps whole versions there.
- name: weightsync-state
  emptyDir: {}
- name: weightsync-tmp
  emptyDir: {}
- name: weightsync-token
  projected:
    sources:
      - serviceAccountToken: {audience: weightsync, expirationSeconds: 3600, path: token}
# Optional: the operator makes it when the namespace has a WeightSync, be that after the pod.
- name: weightsync-ca
  configMap: {name: weightsync-ca, optional: true}
{{- with .Values.agent.volumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What the container gets that the agent serves: the engine's or the trainer's. */}}
{{- define "weightsync.servedEnv" -}}
- {name: WEIGHTSYNC_DIR, value: /run/weightsync}
{{- end }}

{{- define "weightsync.servedMounts" -}}
- {name: weightsync-run, mountPath: /run/weightsync}
{{- end }}

{{/*
What a pod with the annotation weightsync.dev/claim has on top: the GPUs of its claim in the agent, too, and one
/dev/shm for both. The pod's own volume for that, where its container has one.
*/}}
{{- define "weightsync.sharedMemory" -}}
name: weightsync-shm
emptyDir: {medium: Memory}
{{- end }}

{{- define "weightsync.sharedMemoryMount" -}}
{name: weightsync-shm, mountPath: /dev/shm}
{{- end }}
