{{/* The version of the MutatingAdmissionPolicy API to use; empty: nothing can or is to be injected. */}}
{{- define "weightsync.policyVersion" -}}
{{- if .Values.injection.enabled -}}
{{- if .Values.injection.apiVersion -}}
{{ .Values.injection.apiVersion }}
{{- else if .Capabilities.APIVersions.Has "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy" -}}
v1
{{- else if .Capabilities.APIVersions.Has "admissionregistration.k8s.io/v1beta1/MutatingAdmissionPolicy" -}}
v1beta1
{{- else if .Capabilities.APIVersions.Has "admissionregistration.k8s.io/v1alpha1/MutatingAdmissionPolicy" -}}
v1alpha1
{{- end -}}
{{- end -}}
{{- end }}

{{/* Whether the policy that refuses can be there: 1.30 and newer have it. */}}
{{- define "weightsync.refuses" -}}
{{- if and .Values.injection.enabled (or .Values.injection.apiVersion (.Capabilities.APIVersions.Has "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy")) -}}
true
{{- end -}}
{{- end }}

{{/* Which pods it is about: new ones with our label, of the namespaces that this release is for. */}}
{{- define "weightsync.matchConstraints" -}}
matchConstraints:
  resourceRules:
    - apiGroups: [""]
      apiVersions: [v1]
      operations: [CREATE]
      resources: [pods]
  objectSelector:
    matchLabels:
      weightsync.dev/inject: "true"
  {{- if .Values.watchNamespace }}
  namespaceSelector:
    matchLabels:
      kubernetes.io/metadata.name: {{ .Values.watchNamespace }}
  {{- else if .Values.injection.namespaceSelector }}
  namespaceSelector: {{- toYaml .Values.injection.namespaceSelector | nindent 4 }}
  {{- end }}
{{- end }}

{{/* CEL: the name of the container that the agent is for. */}}
{{- define "weightsync.served" -}}
object.metadata.?annotations['weightsync.dev/container'].orValue(object.spec.containers[0].name)
{{- end }}

{{/* CEL: whether there is such a container. */}}
{{- define "weightsync.servedIsThere" -}}
object.spec.containers.exists(c, c.name == {{ include "weightsync.served" . }})
{{- end }}

{{/* CEL: whether the pod says what its agent is to be. */}}
{{- define "weightsync.roleIsGiven" -}}
object.metadata.?labels['weightsync.dev/role'].orValue('') in ['trainer', 'inference']
{{- end }}

{{/* CEL: whether the pod has an agent. */}}
{{- define "weightsync.agentIsThere" -}}
object.spec.?initContainers.orValue([]).exists(c, c.name == 'weightsync-agent')
{{- end }}

{{/* CEL: the claim of the pod that the agent is to have, too; empty: none. */}}
{{- define "weightsync.claim" -}}
object.metadata.?annotations['weightsync.dev/claim'].orValue('')
{{- end }}

{{/* CEL: whether the pod has the claim that it names for the agent; so also where it names none. */}}
{{- define "weightsync.claimIsThere" -}}
{{ include "weightsync.claim" . }} in [''] + object.spec.?resourceClaims.orValue([]).map(c, c.name)
{{- end }}
