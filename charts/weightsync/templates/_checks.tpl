{{/* What values.schema.json can't say: two values that don't go together. */}}
{{- define "weightsync.checks" -}}
{{- if and .Values.watchNamespace .Values.injection.namespaceSelector -}}
{{- fail "watchNamespace already says that pods of that namespace only get agents: leave injection.namespaceSelector out, or watchNamespace" -}}
{{- end -}}
{{- if and (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) -}}
{{- fail "serviceAccount.create is false: name the ServiceAccount to use in serviceAccount.name (default would give its rights to every pod of the namespace)" -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled .Values.metrics.serviceMonitor.enabled (not .Values.networkPolicy.metricsFrom) -}}
{{- fail "networkPolicy.enabled closes the port that metrics.serviceMonitor has scraped: name your Prometheus in networkPolicy.metricsFrom" -}}
{{- end -}}
{{- end }}
