package campaignstats.bench;

import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonToken;
import java.io.IOException;
import java.util.Map;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.common.errors.SerializationException;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.errors.LogAndContinueExceptionHandler;
import org.apache.kafka.streams.errors.LogAndContinueProcessingExceptionHandler;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Grouped;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.state.BuiltInDslStoreSuppliers;
import org.apache.kafka.streams.state.KeyValueStore;

/**
 * Counts the hints of every campaign with Kafka Streams, without a database: counts live in a state store and its
 * changelog.
 *
 * <p>As the developer guide of Kafka Streams 4.3 has it (https://kafka.apache.org/43/streams/developer-guide/):
 * "Writing a Streams Application" (main, shutdown hook), "Streams DSL" (groupByKey, count), "Data Types and
 * Serialization" (a serde for JSON), "Memory Management" (the record cache before the store) and "Configuring a
 * Streams Application" (handlers that log a bad record and go on, the settings below).
 *
 * <p>Environment: KAFKA_BOOTSTRAP_SERVERS, INPUT_TOPIC, OUTPUT_TOPIC, GROUP_ID, STATE_DIR, STORE (rocksdb or memory),
 * COMMIT_MS (empty: 30 s, the default), THREADS, EXPECTED. Prints "counted N" every 100 ms and as its last line, from
 * the first record or, with FROM_HALF=1, from half of EXPECTED on. Ends with 0 once EXPECTED hints are counted,
 * published and committed, with 1 when Kafka Streams gave up. Bad records are not counted.
 */
public final class CountHints {
    private static final long TELL_MS = 100;
    // These two: 5 % less CPU per hint than the defaults, 1 000 and 1 MB; 10 000 and 4 MB only take more memory.
    private static final int BATCH_RECORDS = 5_000;
    private static final int FETCH_BYTES = 2 << 20;
    private static final long CACHE_BYTES = 64 << 20; // every count fits: only a commit flushes it
    private static final JsonFactory JSON = new JsonFactory();
    private static final Serde<Hint> HINTS = Serdes.serdeFrom(
        (topic, hint) -> { throw new SerializationException("hints are only read"); },
        (topic, value) -> hint(value));

    /** What counting needs of a hint. */
    private record Hint(String campaignId) {}

    public static void main(String[] args) throws InterruptedException {
        Map<String, String> environment = System.getenv();
        long expected = Long.parseLong(environment.get("EXPECTED"));
        long tellFrom = "1".equals(environment.get("FROM_HALF")) ? expected / 2 : 1;
        AtomicLong counted = new AtomicLong();
        CountDownLatch done = new CountDownLatch(1);
        Runnable count = () -> {
            if (counted.incrementAndGet() == expected) done.countDown();
        };

        KafkaStreams streams = new KafkaStreams(topology(environment, count), settings(environment));
        streams.setUncaughtExceptionHandler(error -> StreamThreadExceptionResponse.SHUTDOWN_CLIENT);
        streams.setStateListener((state, before) -> {
            if (state == KafkaStreams.State.ERROR) done.countDown();
        });
        Runtime.getRuntime().addShutdownHook(new Thread(streams::close));
        streams.start();
        while (!done.await(TELL_MS, TimeUnit.MILLISECONDS)) {
            if (counted.get() >= tellFrom) tell(counted);
        }
        tell(counted);
        streams.close(); // publishes what the cache holds, then commits
        tell(counted);
        System.exit(counted.get() >= expected ? 0 : 1);
    }

    private static void tell(AtomicLong counted) {
        System.out.println("counted " + counted);
        System.out.flush();
    }

    /** Events to counts. The key already is the campaign's id, so nothing is sent through a repartition topic. */
    private static Topology topology(Map<String, String> environment, Runnable count) {
        Materialized<String, Long, KeyValueStore<Bytes, byte[]>> store = Materialized
            .<String, Long, KeyValueStore<Bytes, byte[]>>as("hints-per-campaign")
            .withKeySerde(Serdes.String())
            .withValueSerde(Serdes.Long())
            .withStoreType("memory".equals(environment.get("STORE"))
                ? BuiltInDslStoreSuppliers.IN_MEMORY
                : BuiltInDslStoreSuppliers.ROCKS_DB);
        StreamsBuilder builder = new StreamsBuilder();
        builder.stream(environment.get("INPUT_TOPIC"), Consumed.with(Serdes.String(), HINTS))
            .peek((key, hint) -> {
                if (hint == null || !hint.campaignId.equals(key)) {
                    throw new IllegalArgumentException("a hint of another campaign than its key says");
                }
                count.run();
            })
            .groupByKey(Grouped.with(Serdes.String(), HINTS))
            .count(store)
            .toStream()
            .mapValues(hints -> Long.toString(hints))
            .to(environment.get("OUTPUT_TOPIC"), Produced.with(Serdes.String(), Serdes.String()));
        return builder.build();
    }

    private static Properties settings(Map<String, String> environment) {
        Properties settings = new Properties();
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, environment.get("GROUP_ID"));
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, environment.get("KAFKA_BOOTSTRAP_SERVERS"));
        settings.put(StreamsConfig.STATE_DIR_CONFIG, environment.get("STATE_DIR"));
        settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, environment.get("THREADS"));
        settings.put(StreamsConfig.PROCESSING_GUARANTEE_CONFIG, StreamsConfig.AT_LEAST_ONCE);
        settings.put(StreamsConfig.REPLICATION_FACTOR_CONFIG, 1); // of the changelog: there is one broker
        settings.put(StreamsConfig.STATESTORE_CACHE_MAX_BYTES_CONFIG, CACHE_BYTES);
        settings.put(StreamsConfig.BUFFERED_RECORDS_PER_PARTITION_CONFIG, BATCH_RECORDS);
        settings.put(StreamsConfig.consumerPrefix(ConsumerConfig.MAX_POLL_RECORDS_CONFIG), BATCH_RECORDS);
        settings.put(StreamsConfig.consumerPrefix(ConsumerConfig.MAX_PARTITION_FETCH_BYTES_CONFIG), FETCH_BYTES);
        settings.put(StreamsConfig.consumerPrefix(ConsumerConfig.AUTO_OFFSET_RESET_CONFIG), "earliest");
        if (!environment.getOrDefault("COMMIT_MS", "").isEmpty()) {
            settings.put(StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, environment.get("COMMIT_MS"));
        }
        settings.put(
            StreamsConfig.DESERIALIZATION_EXCEPTION_HANDLER_CLASS_CONFIG, LogAndContinueExceptionHandler.class);
        settings.put(
            StreamsConfig.PROCESSING_EXCEPTION_HANDLER_CLASS_CONFIG, LogAndContinueProcessingExceptionHandler.class);
        return settings;
    }

    /**
     * Parses the whole value, so that a torn event is noticed; token by token: binding it to a class costs 5 % more CPU
     * per hint. Throws SerializationException, which is logged; the record is left out.
     */
    private static Hint hint(byte[] value) {
        if (value == null) return null;
        String campaignId = null;
        try (JsonParser json = JSON.createParser(value)) {
            if (json.nextToken() != JsonToken.START_OBJECT) throw new SerializationException("no JSON object");
            for (String name = json.nextFieldName(); name != null; name = json.nextFieldName()) {
                if (json.nextToken() == JsonToken.START_OBJECT && name.equals("data")) campaignId = campaignId(json);
                else json.skipChildren();
            }
        } catch (IOException error) {
            throw new SerializationException("no JSON", error);
        }
        if (campaignId == null) throw new SerializationException("no data.campaign_id");
        return new Hint(campaignId);
    }

    /** Reads one object to its end. */
    private static String campaignId(JsonParser json) throws IOException {
        String found = null;
        for (String name = json.nextFieldName(); name != null; name = json.nextFieldName()) {
            if (json.nextToken() == JsonToken.VALUE_STRING && name.equals("campaign_id")) found = json.getText();
            else json.skipChildren();
        }
        return found;
    }
}
