{{/*
What the operator may do. examples/operator-rbac.yaml says why it must, verb by verb, and a test holds the rules here
equal to those there.
*/}}

{{/* In the namespaces that it looks after. */}}
{{- define "weightsync.rules.watched" -}}
- apiGroups: [weightsync.dev]
  resources: [weightsyncs]
  verbs: [get, list, watch]
- apiGroups: [weightsync.dev]
  resources: [weightsyncs/status]
  verbs: [update]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- if not .Values.session.certificateSecret }}
- apiGroups: [""]
  resources: [configmaps]
  verbs: [create]
- apiGroups: [""]
  resources: [configmaps]
  resourceNames: [weightsync-ca]
  verbs: [get, update]
{{- end }}
{{- end }}

{{/* In no namespace. */}}
{{- define "weightsync.rules.reviews" -}}
- apiGroups: [authentication.k8s.io]
  resources: [tokenreviews]
  verbs: [create]
- apiGroups: [authorization.k8s.io]
  resources: [subjectaccessreviews]
  verbs: [create]
{{- end }}

{{/* In its own namespace. */}}
{{- define "weightsync.rules.own" -}}
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [weightsync-operator]
  verbs: [get, update]
{{- if not .Values.session.certificateSecret }}
- apiGroups: [""]
  resources: [secrets]
  verbs: [create]
- apiGroups: [""]
  resources: [secrets]
  resourceNames: [weightsync-ca]
  verbs: [get, update]
{{- end }}
{{- end }}

{{/* A role and its binding to the operator: (dict "root" $ "kind" "Role" "name" "..." "namespace" "..." "rules" "..."). */}}
{{- define "weightsync.role" -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ .kind }}
metadata:
  name: {{ .name }}
  {{- with .namespace }}
  namespace: {{ . }}
  {{- end }}
  labels: {{- include "weightsync.labels" .root | nindent 4 }}
rules:
  {{- include .rules .root | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ .kind }}Binding
metadata:
  name: {{ .name }}
  {{- with .namespace }}
  namespace: {{ . }}
  {{- end }}
  labels: {{- include "weightsync.labels" .root | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: {{ .kind }}
  name: {{ .name }}
subjects:
  - kind: ServiceAccount
    name: {{ include "weightsync.serviceAccount" .root }}
    namespace: {{ .root.Release.Namespace }}
{{- end }}
