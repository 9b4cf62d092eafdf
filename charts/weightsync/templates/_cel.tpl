{{/*
A value as a CEL literal. Kubernetes' CEL takes no list or map whose values are of different types: unless all of them
are text, each is wrapped in dyn().
*/}}
{{- define "weightsync.cel" -}}
{{- if kindIs "map" . -}}
{{- if include "weightsync.allText" (values .) -}}
{ {{- $map := . }}{{ range $at, $key := keys . | sortAlpha }}{{ if $at }}, {{ end }}{{ toJson $key }}: {{ get $map $key | toJson }}{{ end -}} }
{{- else -}}
{
{{- $map := . }}{{ range $at, $key := keys . | sortAlpha }}{{ if $at }},{{ end }}
  {{ toJson $key }}: dyn({{ include "weightsync.cel" (get $map $key) | indent 2 | trim }})
{{- end }}
}
{{- end -}}
{{- else if kindIs "slice" . -}}
{{- if include "weightsync.allText" . -}}
{{ toJson . }}
{{- else -}}
[
{{- range $at, $item := . }}{{ if $at }},{{ end }}
  dyn({{ include "weightsync.cel" $item | indent 2 | trim }})
{{- end }}
]
{{- end -}}
{{- else if kindIs "float64" . -}}
{{ if eq (floor .) . }}{{ int64 . }}{{ else }}{{ . | toString | toJson }}{{ end }}
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end }}

{{- define "weightsync.allText" -}}
{{- $all := true }}{{ range . }}{{ if not (kindIs "string" .) }}{{ $all = false }}{{ end }}{{ end -}}
{{ $all | ternary "true" "" }}
{{- end }}
