// A small agent with gorilla/websocket, after the vendor's guide. Arguments and output: see python_agent.py.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

type message struct {
	Type      string                 `json:"type"`
	RequestID string                 `json:"request_id,omitempty"`
	Payload   map[string]interface{} `json:"payload"`
	Timestamp time.Time              `json:"timestamp"`
}

type object = map[string]interface{}

type agent struct {
	url, token, id, name string
	interval             time.Duration
	registers            int
	printing             sync.Mutex
}

func (a *agent) tell(event string, more object) {
	a.printing.Lock()
	defer a.printing.Unlock()
	if more == nil {
		more = object{}
	}
	more["event"] = event
	line, _ := json.Marshal(more)
	fmt.Println(string(line))
}

// session lives as long as one connection.
func (a *agent) session() error {
	conn, _, err := websocket.DefaultDialer.Dial(a.url+"?token="+a.token, nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	a.tell("connected", nil)

	var writing sync.Mutex
	send := func(kind, requestID string, payload object) error {
		writing.Lock()
		defer writing.Unlock()
		return conn.WriteJSON(message{Type: kind, RequestID: requestID, Payload: payload, Timestamp: time.Now()})
	}
	done := make(chan struct{})
	defer close(done)

	a.registers++
	registration := object{"agent_id": a.id, "name": a.name, "k8s_version": "1.27.0", "agent_version": "1.0.0"}
	if err := send("register", fmt.Sprintf("req_%d", a.registers), registration); err != nil {
		return err
	}
	for {
		var received message
		if err := conn.ReadJSON(&received); err != nil {
			return err
		}
		switch received.Type {
		case "register_success":
			clusterID := received.Payload["cluster_id"]
			a.tell("registered", object{"cluster_id": clusterID, "status": received.Payload["status"]})
			go func() {
				for {
					heartbeat := object{"cluster_id": clusterID, "agent_id": a.id,
						"status": "available", "tunnel_status": "connected"}
					if send("heartbeat", "", heartbeat) != nil {
						return
					}
					select {
					case <-done:
						return
					case <-time.After(a.interval):
					}
				}
			}()
		case "ping":
			err = send("pong", received.RequestID, object{"timestamp": time.Now()})
		case "command":
			err = send("command_result", received.RequestID,
				object{"command_id": received.Payload["command_id"], "success": true, "output": "done"})
		default:
			a.tell(received.Type, object{"error": received.Payload["error"]})
		}
		if err != nil {
			return err
		}
	}
}

func main() {
	milliseconds, err := strconv.Atoi(os.Args[5])
	if err != nil {
		panic(err)
	}
	a := &agent{url: os.Args[1], token: os.Args[2], id: os.Args[3], name: os.Args[4],
		interval: time.Duration(milliseconds) * time.Millisecond}
	delay := 50 * time.Millisecond
	for {
		a.tell("closed", object{"reason": a.session().Error()})
		time.Sleep(delay)
		if delay *= 2; delay > time.Minute {
			delay = time.Minute
		}
	}
}
