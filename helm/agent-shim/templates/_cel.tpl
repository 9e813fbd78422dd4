{{/*
A value of a manifest as a CEL literal: (dict "value" … "type" "Object.spec.volumes"). Objects need their type's name, which
is their path; maps whose keys are free are plain maps. Policies of Kubernetes accept no JSON here.
*/}}
{{- define "agent-shim.cel" -}}
{{- $type := .type -}}
{{- if kindIs "map" .value -}}
{{- $free := has (last (splitList "." $type)) (list "requests" "limits" "labels" "annotations" "matchLabels" "volumeAttributes" "nodePublishSecretRef") -}}
{{- $fields := list -}}
{{- range $key, $value := .value -}}
{{- $name := ternary (toJson $key) $key $free -}}
{{- /* One type of values in a map, says Kubernetes' CEL: a quantity such as 1 is a text. */}}
{{- $value = ternary (toString $value) $value $free -}}
{{- $fields = append $fields (printf "%s: %s" $name (include "agent-shim.cel" (dict "value" $value "type" (printf "%s.%s" $type $key)))) -}}
{{- end -}}
{{ if not $free }}{{ $type }}{{ end }}{ {{- join ", " $fields -}} }
{{- else if kindIs "slice" .value -}}
{{- $items := list -}}
{{- range .value -}}
{{- $items = append $items (include "agent-shim.cel" (dict "value" . "type" $type)) -}}
{{- end -}}
[{{ join ", " $items }}]
{{- else if kindIs "float64" .value -}}
{{ int64 .value }}
{{- else -}}
{{ toJson .value }}
{{- end -}}
{{- end }}

{{/* Whether a pod has all labels of an entry, for each entry of agent.podLabels. */}}
{{- define "agent-shim.celIsAgent" -}}
{{- $entries := list -}}
{{- range .Values.agent.podLabels -}}
{{- $labels := list "has(object.metadata.labels)" -}}
{{- range $key, $value := . -}}
{{- $labels = append $labels (printf "%s in object.metadata.labels && object.metadata.labels[%s] == %s" (toJson $key) (toJson $key) (toJson $value)) -}}
{{- end -}}
{{- $entries = append $entries (printf "(%s)" (join " && " $labels)) -}}
{{- end -}}
{{ join " || " $entries }}
{{- end }}

{{/* The sidecar's container. Where the agent's own variable holds the controller's URL, it moves over. */}}
{{- define "agent-shim.celContainer" -}}
{{- $container := include "agent-shim.container" . | fromYaml -}}
{{- $_ := set $container "restartPolicy" "Always" -}}
{{- $fields := list -}}
{{- range $key, $value := $container -}}
{{- $cel := include "agent-shim.cel" (dict "value" $value "type" (printf "Object.spec.initContainers.%s" $key)) -}}
{{- if and (eq $key "env") (not $.Values.upstream.url) (eq $.Values.agent.install "chart") -}}
{{- $cel = printf "%s + (variables.url == \"\" ? [] : [Object.spec.initContainers.env{name: \"SHIM_UPSTREAM__URL\", value: variables.url}])" $cel -}}
{{- end -}}
{{- $fields = append $fields (printf "%s: %s" $key $cel) -}}
{{- end -}}
Object.spec.initContainers{ {{- join ",\n" $fields -}} }
{{- end }}
