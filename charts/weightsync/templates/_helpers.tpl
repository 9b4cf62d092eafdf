{{/* The name of all that belongs to the operator, and the host that agents dial. */}}
{{- define "weightsync.fullname" -}}
{{ .Values.fullnameOverride | default "weightsync-operator" }}
{{- end }}

{{/* The name of what belongs to no namespace. A second release, for another namespace, is to fit beside the first. */}}
{{- define "weightsync.clusterName" -}}
{{ include "weightsync.fullname" . }}{{ with .Values.watchNamespace }}-{{ . }}{{ end }}
{{- end }}

{{- define "weightsync.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "weightsync.fullname" .) }}
{{- end }}

{{- define "weightsync.host" -}}
{{ include "weightsync.fullname" . }}.{{ .Release.Namespace }}.svc
{{- end }}

{{- define "weightsync.selectorLabels" -}}
app.kubernetes.io/name: weightsync-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "weightsync.labels" -}}
{{ include "weightsync.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: weightsync
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* An image: (list $ .Values.image). The digest decides; the tag beside it is for people. */}}
{{- define "weightsync.image" -}}
{{- $root := index . 0 }}{{ $image := index . 1 }}
{{- printf "%s:%s" $image.repository ($image.tag | default $root.Chart.AppVersion) }}{{ with $image.digest }}@{{ . }}{{ end }}
{{- end }}

{{/* The environment's variables that say which pod it is, for operator and agent. */}}
{{- define "weightsync.podEnv" -}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end }}

{{/* What Pod Security's level "restricted" asks of a container, and no file of the image that can be changed. */}}
{{- define "weightsync.restricted" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
readOnlyRootFilesystem: true
runAsNonRoot: true
seccompProfile: {type: RuntimeDefault}
{{- end }}
