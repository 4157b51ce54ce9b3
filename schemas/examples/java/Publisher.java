import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ObjectNode;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.time.Instant;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.UUID;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.serialization.ByteArraySerializer;
import org.apache.kafka.common.serialization.StringSerializer;

import static java.nio.charset.StandardCharsets.UTF_8;

/** A neighbour that publishes hints: lines "CAMPAIGN PROSPECT STATUS" on stdin, each of them after your own commit. */
public final class Publisher {
    private static final ObjectMapper JSON = new ObjectMapper();
    private static final String TOPIC = env("TOPIC_PREFIX", "") + "prospect.status-changed";

    public static void main(String[] args) throws Exception {
        boolean isBinary = List.of(args).contains("--binary");
        Map<String, Object> settings = Map.of(
            "bootstrap.servers", env("KAFKA_BOOTSTRAP_SERVERS", "localhost:9092"),
            "acks", "all",
            "enable.idempotence", !env("IDEMPOTENCE", "true").equals("false"),
            "max.block.ms", Long.MAX_VALUE, // wait for brokers that are away, and repeat until one of them has it:
            "delivery.timeout.ms", Integer.MAX_VALUE); // the same record, so the same event
        try (var producer = new KafkaProducer<>(settings, new StringSerializer(), new ByteArraySerializer());
             var lines = new BufferedReader(new InputStreamReader(System.in, UTF_8))) {
            for (String line; (line = lines.readLine()) != null; ) {
                String[] words = line.split(" ", 3);
                String campaign = words[0].toLowerCase(Locale.ROOT); // the key: one partition per campaign
                ObjectNode data = JSON.createObjectNode().put("campaign_id", campaign);
                data.put("prospect_id", words[1]).put("to_status", words[2]);
                producer.send(isBinary ? binary(campaign, data) : structured(campaign, data)).get(); // acknowledged
            }
        }
    }

    private static ObjectNode attributes(String campaign) {
        ObjectNode event = JSON.createObjectNode().put("specversion", "1.0").put("id", UUID.randomUUID().toString());
        event.put("source", "/neighbour").put("type", "prospect.status_changed.v1");
        return event.put("time", Instant.now().toString()).put("subject", campaign);
    }

    /** The event is the value. */
    private static ProducerRecord<String, byte[]> structured(String campaign, ObjectNode data) throws Exception {
        ObjectNode event = attributes(campaign).put("datacontenttype", "application/json").set("data", data);
        var record = new ProducerRecord<>(TOPIC, campaign, JSON.writeValueAsBytes(event));
        record.headers().add("content-type", "application/cloudevents+json".getBytes(UTF_8));
        return record;
    }

    /** The data is the value, and each attribute a header. */
    private static ProducerRecord<String, byte[]> binary(String campaign, ObjectNode data) throws Exception {
        var record = new ProducerRecord<>(TOPIC, campaign, JSON.writeValueAsBytes(data));
        for (var attribute : attributes(campaign).properties()) {
            record.headers().add("ce_" + attribute.getKey(), attribute.getValue().textValue().getBytes(UTF_8));
        }
        record.headers().add("content-type", "application/json".getBytes(UTF_8));
        return record;
    }

    private static String env(String name, String otherwise) {
        return System.getenv().getOrDefault(name, otherwise);
    }
}
