import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.io.FileOutputStream;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import org.apache.kafka.clients.consumer.CommitFailedException;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.common.errors.RebalanceInProgressException;
import org.apache.kafka.common.errors.WakeupException;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;

import static com.fasterxml.jackson.databind.DeserializationFeature.FAIL_ON_TRAILING_TOKENS;
import static java.nio.charset.StandardCharsets.UTF_8;

/** A neighbour that reacts once to each pause and follows numbers by version. Its state: DIRECTORY/reactions.jsonl. */
public final class Subscriber {
    private static final ObjectMapper JSON = new ObjectMapper().enable(FAIL_ON_TRAILING_TOKENS);
    private static final Map<String, Long> KNOWN = new HashMap<>(); // pause -> 0, campaign -> version

    public static void main(String[] args) throws IOException {
        Path path = Path.of(args[0], "reactions.jsonl");
        String prefix = System.getenv().getOrDefault("TOPIC_PREFIX", "");
        var settings = Map.<String, Object>of(
            "bootstrap.servers", System.getenv("KAFKA_BOOTSTRAP_SERVERS"),
            "group.id", System.getenv().getOrDefault("GROUP_ID", "neighbour"), // all of a group must share one memory
            "enable.auto.commit", false,
            "auto.offset.reset", "earliest"); // an old pause late rather than one never, as with "latest"
        var ended = new CompletableFuture<Void>();
        try (var file = new FileOutputStream(path.toFile(), true);
             var consumer = new KafkaConsumer<>(settings, new ByteArrayDeserializer(), new ByteArrayDeserializer())) {
            if (file.getChannel().tryLock() == null) throw new IOException("another subscriber writes " + path);
            byte[] memory = Files.readAllBytes(path);
            int end = memory.length;
            while (end > 0 && memory[end - 1] != '\n') end--; // a crash may have torn the last line
            file.getChannel().truncate(end);
            for (String line : new String(memory, 0, end, UTF_8).lines().toList()) isNew(JSON.readTree(line));

            Runtime.getRuntime().addShutdownHook(new Thread(() -> { consumer.wakeup(); ended.join(); }));
            consumer.subscribe(List.of(prefix + "campaign.paused", prefix + "campaign.stats-updated"));
            while (true) {
                var lines = new StringBuilder();
                for (var record : consumer.poll(Duration.ofSeconds(1))) {
                    try {
                        JsonNode reaction = reaction(JSON.readTree(record.value()));
                        if (reaction != null && isNew(reaction)) lines.append(reaction).append('\n');
                    } catch (IOException | IllegalArgumentException error) { // nobody can read it: do not stop
                        System.err.printf("no event: %s %d %d%n", record.topic(), record.partition(), record.offset());
                    }
                }
                file.write(lines.toString().getBytes(UTF_8));
                file.getChannel().force(true);
                System.out.print(lines); // in place of what you do
                System.out.flush();
                try {
                    consumer.commitSync(); // after the memory, never before: a crash repeats records and loses none
                } catch (CommitFailedException | RebalanceInProgressException takenOver) {} // their next owner repeats
            }
        } catch (WakeupException stopped) { // by SIGTERM
        } finally {
            ended.complete(null); // the group is left, so that nobody waits for us
        }
    }

    /** Null for a type that a later release brings; unknown reasons and fields are not even looked at. */
    private static JsonNode reaction(JsonNode event) {
        if (!text(event, "/source").equals("campaign-stats")) throw new IllegalArgumentException("another source");
        return switch (text(event, "/type")) { // it decides, not the topic
            case "campaign.paused.v1" -> JSON.createObjectNode().put("reaction", "paused")
                .put("id", text(event, "/id")).put("campaign_id", text(event, "/data/campaign_id"));
            case "campaign.stats_updated.v1" -> JSON.createObjectNode().put("reaction", "stats")
                .put("campaign_id", text(event, "/data/campaign/id")).put("version", number(event, "/data/version"))
                .put("total", number(event, "/data/campaign/stats/total"));
            default -> null;
        };
    }

    /** Whether it is new, and known from now on: a pause by its id, numbers by campaign and version. */
    private static boolean isNew(JsonNode reaction) {
        String key = reaction.path("id").asText("stats of " + reaction.path("campaign_id").asText());
        long version = reaction.path("version").asLong(), before = KNOWN.getOrDefault(key, -1L);
        KNOWN.put(key, Math.max(version, before));
        return version > before;
    }

    private static String text(JsonNode event, String place) {
        if (event.at(place).isTextual()) return event.at(place).textValue();
        throw new IllegalArgumentException(place + " is no text");
    }

    private static long number(JsonNode event, String place) {
        JsonNode found = event.at(place);
        if (found.isIntegralNumber() && found.canConvertToLong()) return found.longValue();
        throw new IllegalArgumentException(place + " is no number");
    }
}
