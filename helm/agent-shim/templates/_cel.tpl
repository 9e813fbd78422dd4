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

{{/* The sidecar's container. */}}
{{- define "agent-shim.celContainer" -}}
{{- $container := include "agent-shim.container" . | fromYaml -}}
{{- $_ := set $container "restartPolicy" "Always" -}}
{{- $fields := list -}}
{{- range $key, $value := $container -}}
{{- $cel := include "agent-shim.cel" (dict "value" $value "type" (printf "Object.spec.initContainers.%s" $key)) -}}
{{- $fields = append $fields (printf "%s: %s" $key $cel) -}}
{{- end -}}
Object.spec.initContainers{ {{- join ",\n" $fields -}} }
{{- end }}

{{/* The names of the sidecar's volumes, as a CEL list. */}}
{{- define "agent-shim.volumeNames" -}}
{{- $names := list -}}
{{- range (include "agent-shim.volumes" . | fromYamlArray) }}{{ $names = append $names .name }}{{ end -}}
{{- toJson $names -}}
{{- end }}

{{/*
Whether the sidecar takes the controller's URL from the agent's own variable, as CEL. The variable beats the Secret, as it does
for the agent. One that names the shim itself does not count where the Secret has the real URL.
*/}}
{{- define "agent-shim.celMovesURL" -}}
{{- if or .Values.upstream.url (ne .Values.mode "sidecar") -}}
false
{{- else if eq .Values.agent.install "chart" -}}
variables.url >= 0
{{- else -}}
variables.url >= 0 && !(has(variables.agent.env[variables.url].value) && variables.agent.env[variables.url].value in {{ include "agent-shim.ownURLs" . }})
{{- end -}}
{{- end }}

{{/* The addresses of the shim that an agent in its pod may have been given by hand. */}}
{{- define "agent-shim.ownURLs" -}}
{{- $urls := list -}}
{{- range list "127.0.0.1" "localhost" "[::1]" -}}
{{- $urls = concat $urls (list (printf "http://%s:%v" . $.Values.ports.legacy) (printf "http://%s:%v/" . $.Values.ports.legacy)) -}}
{{- end -}}
{{- toJson $urls -}}
{{- end }}

{{/*
The patches that move the agent's variable into the sidecar, whatever kind it is of: a value, a Secret's or a ConfigMap's key, a
field. Empty: the URL is given by upstream.url. It takes the place of the variable that reads the vendor's Secret.
*/}}
{{- define "agent-shim.celMoveURL" -}}
{{- if and (not .Values.upstream.url) (eq .Values.mode "sidecar") -}}
{{- $at := 2 -}}
{{- $reads := false -}}
{{- range $index, $entry := include "agent-shim.env" . | fromYamlArray -}}
{{- if eq $entry.name "SHIM_UPSTREAM__URL" }}{{ $at = $index }}{{ $reads = true }}{{ end -}}
{{- end -}}
{{- $path := printf "/spec/initContainers/0/env/%d" $at -}}
(!variables.movesURL ? [] : [
  {{- if $reads }}
  JSONPatch{op: "remove", path: {{ $path | quote }}},
  {{- end }}
  JSONPatch{op: "copy", from: variables.place, path: {{ $path | quote }}},
  JSONPatch{op: "replace", path: "{{ $path }}/name", value: "SHIM_UPSTREAM__URL"}
])
{{- end -}}
{{- end }}
