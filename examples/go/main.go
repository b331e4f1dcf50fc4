// Ask the agent-loop service, show the answer as it is written, and say that it was good.
//
//	AGENTLOOP_TOKEN=al_… go run . "Write a haiku about rivers."
//
// The code under gen/ is generated from the protos (see buf.gen.yaml).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "example.org/agentloop-example/gen/agentloop/v1"
)

func main() {
	address := flag.String("server", "127.0.0.1:50051", "host:port")
	tls := flag.Bool("tls", false, "encrypt, as anywhere but on the same host")
	maxTokens := flag.Uint("max-tokens", 64, "1 to 8192")
	timeout := flag.Duration("timeout", time.Minute, "the deadline of the whole answer")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "give one prompt")
		os.Exit(2)
	}
	if err := run(*address, *tls, flag.Arg(0), uint32(*maxTokens), *timeout); err != nil {
		explain(err)
		os.Exit(1)
	}
}

func run(address string, tls bool, prompt string, maxTokens uint32, timeout time.Duration) error {
	transport := insecure.NewCredentials()
	if tls {
		transport = credentials.NewTLS(nil)
	}
	connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(transport))
	if err != nil {
		return err
	}
	defer connection.Close()
	// A deadline travels with the call: the server stops the engine when it has passed, or when we cancel.
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+os.Getenv("AGENTLOOP_TOKEN"))
	inference, err := ask(ctx, pb.NewInferenceServiceClient(connection), prompt, maxTokens)
	if err != nil {
		return err
	}
	_, err = pb.NewFeedbackServiceClient(connection).Submit(ctx, &pb.SubmitRequest{
		InferenceId: inference,
		Value:       &pb.SubmitRequest_Boolean{Boolean: true},
	})
	return err
}

// ask streams one answer to stdout and returns the inference's id, which feedback names.
func ask(ctx context.Context, client pb.InferenceServiceClient, prompt string, maxTokens uint32) (string, error) {
	stream, err := client.Chat(ctx, &pb.ChatRequest{
		Alias:    "default",
		Messages: []*pb.Message{{Role: pb.Role_ROLE_USER, Content: prompt}},
		Sampling: &pb.SamplingOptions{MaxTokens: proto.Uint32(maxTokens), Temperature: proto.Float32(0)},
	})
	if err != nil {
		return "", err
	}
	inference := ""
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return inference, nil
		}
		if err != nil {
			return inference, err
		}
		switch event := response.Event.(type) {
		case *pb.ChatResponse_Started:
			inference = event.Started.InferenceId
			fmt.Fprintf(os.Stderr, "inference %s by %s\n", inference, event.Started.ModelVersion)
		case *pb.ChatResponse_TextDelta:
			fmt.Print(event.TextDelta.Text)
		case *pb.ChatResponse_Completed:
			fmt.Println()
			fmt.Fprintf(os.Stderr, "%d tokens written\n", event.Completed.Usage.OutputTokens)
		}
	}
}

// explain prints the status, and what it says for programs: which field is wrong, when to try again.
func explain(err error) {
	told := status.Convert(err)
	fmt.Fprintf(os.Stderr, "%s: %s\n", told.Code(), told.Message())
	for _, detail := range told.Details() {
		switch detail := detail.(type) {
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				fmt.Fprintf(os.Stderr, "field: %s\n", violation.Field)
			}
		case *errdetails.RetryInfo:
			fmt.Fprintf(os.Stderr, "try again after %s\n", detail.RetryDelay.AsDuration())
		}
	}
}
