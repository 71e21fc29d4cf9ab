//! The command line. Types of `clap` stay here and in `commands`.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

/// Version with the commit it was built from.
pub const VERSION: &str = env!("FULGURITE_VERSION");

/// From raw crawl to a trained language model.
#[derive(Debug, Parser)]
#[command(name = "fulgurite", version = VERSION, about, max_term_width = 100, propagate_version = true)]
pub struct Cli {
    /// Logs.
    #[command(flatten)]
    pub logging: Logging,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Log options, on every command.
#[derive(Debug, Args)]
pub struct Logging {
    /// Only errors on stderr
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// More on stderr; repeat for still more (RUST_LOG overrides)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Form of logs and progress on stderr
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub log_format: LogFormat,
}

/// Form of logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// How committed files are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verify {
    /// Read every file and compare its checksum.
    Checksums,
    /// Compare sizes alone.
    Sizes,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a recipe, or continue a run that stopped
    Run(Run),
    /// Train a model on the token shards of a run, or continue a training run that stopped
    Train(Train),
    /// What each stage of a run has done
    Status(Status),
    /// Ask a question about a run's shards and signals
    Sql(Sql),
    /// What each rule and each dedup step removed, as a table and as one HTML file
    Report(Report),
    /// Look at random documents in a browser and mark what should have been kept or dropped
    Review(Review),
    /// Train text classifiers to use as signals
    #[command(subcommand)]
    Classifier(Classifier),
    /// Deduplication, before it runs
    #[command(subcommand)]
    Dedup(Dedup),
    /// Look into a shard, a manifest, a journal, a checkpoint or a model
    Inspect(Inspect),
    /// Figures of a run
    Stats(Stats),
    /// Train a tokenizer
    Tokenizer(Tokenizer),
    /// Continue a prompt with a trained model
    Generate(Generate),
    /// Mean next-token cross-entropy of token ids under a published model
    Evaluate(Evaluate),
    /// Write a checkpoint in the published (Hugging Face) layout
    Export(Export),
    /// Check what this machine offers: cores, memory, CUDA libraries, what its GPUs reach
    Doctor(Doctor),
    /// Measure the kernels of this machine's GPU
    Bench {
        /// What to measure
        #[command(subcommand)]
        what: Bench,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// `fulgurite run`
#[derive(Clone, Debug, Args)]
pub struct Run {
    /// The recipe, a TOML file
    pub recipe: PathBuf,
    /// Where the run lives [default: runs/NAME]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Tasks at a time [default: one per core]; outputs never depend on it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Memory that stages may hold, which spill to disk or do fewer tasks at a time, e.g. 8GiB [default: half of the machine's]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory_limit: Option<u64>,
    /// Stop after this stage
    #[arg(long, value_name = "STAGE")]
    pub until: Option<String>,
    /// Override one key of the recipe, e.g. train.steps=200
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Print what would be done and why, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// How committed shards are checked before they are built upon: `sizes` does not read them, and does not notice
    /// bytes that changed in place
    #[arg(long, value_enum, default_value_t = Verify::Checksums, value_name = "HOW")]
    pub verify: Verify,
    /// Device to train on
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value = "auto")]
    pub device: String,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// `fulgurite train`
#[derive(Debug, Args)]
pub struct Train {
    /// The settings of the training run, a TOML file
    pub config: PathBuf,
    /// Where checkpoints and metrics go [default: runs/NAME]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Override one key of the settings, e.g. train.steps=200
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Device to train on; of several ranks each takes the GPU of its number, counted on from this one
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value = "auto")]
    pub device: String,
    /// Train with N processes on this host, one a GPU; without it this process is the rank that RANK and WORLD_SIZE
    /// (torchrun), or SLURM's variables, say it is
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub nproc: Option<u32>,
    /// Seconds that ranks wait for each other at the start, and for a sign of life from one that has died or hangs; longer
    /// than anything that a rank does alone
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    pub rank_timeout_s: u64,
    /// Print parameters, memory, operations and expected speed, with --nproc also of that many ranks, and do nothing
    #[arg(long)]
    pub estimate: bool,
    /// Record N steps, kernel by kernel, in profile.json for Chrome's and Perfetto's viewers
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub profile: u64,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// `fulgurite status`
#[derive(Debug, Args)]
pub struct Status {
    /// The run directory
    pub run: PathBuf,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

/// `fulgurite sql`
#[derive(Debug, Args)]
pub struct Sql {
    /// The run directory
    pub run: PathBuf,
    /// The query; each stage is a table, its dropped rows are STAGE_dropped. Without it: the tables
    pub query: Option<String>,
    /// Print one JSON object a row, with every value whole: the table cuts long ones
    #[arg(long)]
    pub json: bool,
}

/// `fulgurite report`
#[derive(Debug, Args)]
pub struct Report {
    /// The run directory
    pub run: PathBuf,
    /// Form of the report: html is written to a file, json and md are printed [default: html]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Option<ReportFormat>,
    /// The same as --format json
    #[arg(long, conflicts_with = "format")]
    pub json: bool,
    /// Write the report here [default for html: RUN/report.html]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Form of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    /// One file for a browser.
    Html,
    /// One JSON object.
    Json,
    /// Markdown.
    Md,
}

/// `fulgurite review`
#[derive(Debug, Args)]
pub struct Review {
    /// The run directory
    pub run: PathBuf,
    /// Show what this stage dropped or kept [default: what any stage dropped, what all kept]
    #[arg(long, value_name = "STAGE")]
    pub stage: Option<String>,
    /// Show dropped documents of every rule, or kept ones of every source
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = ReviewBy::Rule)]
    pub by: ReviewBy,
    /// Documents of each rule or source
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub documents: usize,
    /// Seed of the choice
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Port on the loopback interface; 0 for a free one
    #[arg(long, default_value_t = 8765)]
    pub port: u16,
    /// Print the precision of each rule from the marks so far, and end
    #[arg(long)]
    pub summary: bool,
    /// With --summary: print as JSON
    #[arg(long, requires = "summary")]
    pub json: bool,
}

/// What a review goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReviewBy {
    /// Dropped documents, rule by rule.
    Rule,
    /// Kept documents, source by source.
    Source,
}

/// `fulgurite classifier`
#[derive(Debug, Subcommand)]
pub enum Classifier {
    /// Train a classifier from good and bad examples
    Train(ClassifierTrain),
}

/// `fulgurite classifier train`
#[derive(Debug, Args)]
pub struct ClassifierTrain {
    /// Files, directories or globs of positive examples (JSONL, Parquet, WARC, text)
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    pub positive: Vec<String>,
    /// Files, directories or globs of negative examples
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    pub negative: Vec<String>,
    /// Where the model goes
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Field of a record that holds the text
    #[arg(long, value_name = "NAME", default_value = "text")]
    pub field: String,
    /// Examples of each kind at most, chosen by hash: each takes 4 bytes for each n-gram of its first 2,000 words
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    pub max_examples: usize,
    /// Words of the longest n-grams
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub ngrams: usize,
    /// 2^N weights of 4 bytes
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub bits: u32,
    /// Passes over the examples
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub epochs: u32,
    /// Seed of the order and of the examples held out
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Print the figures as JSON
    #[arg(long)]
    pub json: bool,
}

/// `fulgurite dedup`
#[derive(Debug, Subcommand)]
pub enum Dedup {
    /// What near-duplicate removal will find, and its disk and memory, for a corpus of N documents
    Plan(DedupPlan),
}

/// `fulgurite dedup plan`
#[derive(Debug, Args)]
pub struct DedupPlan {
    /// The recipe, whose [near] table is planned [default: FineWeb's setting]
    pub recipe: Option<PathBuf>,
    /// Documents of the corpus, e.g. 100e6
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub documents: u64,
    /// Bytes of text of a document, on the mean
    #[arg(long, value_name = "BYTES", value_parser = parse_size, default_value = "4000")]
    pub bytes_per_document: u64,
    /// Override one key of the recipe, e.g. near.bands=20
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "recipe")]
    pub set: Vec<String>,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

/// `fulgurite inspect`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Inspect {
    /// Something that needs a closer look
    #[command(subcommand)]
    pub closer: Option<InspectCloser>,
    /// A Parquet shard, a manifest.json, a journal.jsonl, a checkpoint or model directory
    #[arg(required = true)]
    pub path: Option<PathBuf>,
    /// Rows of a shard to show
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub rows: usize,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

/// What `fulgurite inspect` looks into more closely.
#[derive(Debug, Subcommand)]
pub enum InspectCloser {
    /// Documents of a token shard, with the borders of their tokens
    Tokens(InspectTokens),
}

/// `fulgurite inspect tokens`
#[derive(Debug, Args)]
pub struct InspectTokens {
    /// A token shard: RUN/tokens/part-00000.parquet
    pub shard: PathBuf,
    /// Documents to show
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub rows: usize,
    /// Tokens of each to show
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub tokens: usize,
    /// The tokenizer.json [default: that of the run]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Print one JSON object a document
    #[arg(long)]
    pub json: bool,
}

/// `fulgurite stats`
#[derive(Debug, Args)]
pub struct Stats {
    /// Of what
    #[command(subcommand)]
    pub of: StatsOf,
}

/// What there are figures of.
#[derive(Debug, Subcommand)]
pub enum StatsOf {
    /// Documents, tokens and bytes per token by source, and what packing does to them
    Tokens(StatsTokens),
}

/// `fulgurite stats tokens`
#[derive(Debug, Args)]
pub struct StatsTokens {
    /// The run directory
    pub run: PathBuf,
    /// Length of the sequences to pack documents into
    #[arg(long, value_name = "T", default_value_t = 2048)]
    pub sequence_length: usize,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

/// `fulgurite tokenizer`
#[derive(Debug, Args)]
pub struct Tokenizer {
    /// What to do
    #[command(subcommand)]
    pub command: TokenizerCommand,
}

/// What can be done with a tokenizer.
#[derive(Debug, Subcommand)]
pub enum TokenizerCommand {
    /// Run a recipe as far as its tokenizer, or continue where that stopped
    Train(TokenizerTrain),
}

/// `fulgurite tokenizer train`
#[derive(Debug, Args)]
pub struct TokenizerTrain {
    /// The run.
    #[command(flatten)]
    pub run: Run,
    /// Copy the tokenizer.json here
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// `fulgurite generate`
#[derive(Debug, Args)]
pub struct Generate {
    /// A checkpoint directory, a train stage directory (its newest checkpoint) or a published model
    #[arg(long, value_name = "DIR")]
    pub checkpoint: PathBuf,
    /// The text to continue; several are continued together on a GPU, one after the other elsewhere
    #[arg(long, required = true)]
    pub prompt: Vec<String>,
    /// A tokenizer.json, where the checkpoint has none beside it
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Tokens to write at most
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_tokens: usize,
    /// 0 takes the likeliest token every time
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    pub temperature: f64,
    /// Choose among the K likeliest tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// Choose among the likeliest tokens that together have probability P
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    pub top_p: f64,
    /// Seed of the choice
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Device
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value = "auto")]
    pub device: String,
    /// Print prompt, text and token ids as JSON at the end
    #[arg(long)]
    pub json: bool,
}

/// `fulgurite evaluate`
#[derive(Debug, Args)]
pub struct Evaluate {
    /// A published model: config.json and model.safetensors
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// A JSON file: a list of lists of token ids
    #[arg(long, value_name = "FILE")]
    pub ids: PathBuf,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

/// `fulgurite export`
#[derive(Debug, Args)]
pub struct Export {
    /// A checkpoint directory, or a train stage directory (its newest checkpoint)
    pub checkpoint: PathBuf,
    /// Where to write config.json, model.safetensors and tokenizer.json
    pub dir: PathBuf,
    /// A tokenizer.json, where the checkpoint has none beside it
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
}

/// `fulgurite doctor`
#[derive(Debug, Args)]
pub struct Doctor {
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

/// `fulgurite bench`
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Lightning Attention, forward and backward, against the time that its bytes take
    Attention(BenchAttention),
    /// Steps of a training run on random tokens: time, memory, and where the time goes
    Train(BenchTrain),
    /// Generation by a fresh model: tokens per second after contexts of different lengths
    Generate(BenchGenerate),
    /// All-reduce, reduce-scatter, all-gather and a relay between GPUs: right sums, and bandwidth by size
    Collectives(BenchCollectives),
}

/// `fulgurite bench collectives`
#[derive(Debug, Args)]
pub struct BenchCollectives {
    /// Start N ranks on this host, a GPU each; without it this process is one rank, as the environment says
    #[arg(long, value_name = "N")]
    pub nproc: Option<usize>,
    /// Mebibytes of the larger side
    #[arg(long = "mib", value_name = "MIB", value_delimiter = ',', default_value = "1,16,64,256")]
    pub mib: Vec<u64>,
    /// auto, cuda or cuda:N; of several ranks each takes the GPU of its local number
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Print as JSON, a line each
    #[arg(long)]
    pub json: bool,
}

/// `fulgurite bench generate`
#[derive(Debug, Args)]
pub struct BenchGenerate {
    /// A size of the paper's table: tiny, small, 385m, 1b, 3b, 7b …
    #[arg(long, default_value = "385m")]
    pub size: String,
    /// Texts that are continued together; may be given several times
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,32")]
    pub rows: Vec<usize>,
    /// Tokens read before
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "1024,1048576")]
    pub context: Vec<usize>,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub tokens: usize,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Print as JSON, a line each
    #[arg(long)]
    pub json: bool,
}

/// `fulgurite bench train`
#[derive(Debug, Args)]
pub struct BenchTrain {
    /// A size of the paper's table: tiny, small, 385m, 1b, 3b, 7b …
    #[arg(long, default_value = "385m")]
    pub size: String,
    /// Sequences of a micro batch
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub batch: usize,
    /// Tokens of a sequence
    #[arg(long, value_name = "T", default_value_t = 2048)]
    pub length: usize,
    /// Micro batches of a step, of all ranks together
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub accumulate: usize,
    /// Start N ranks on this host, a GPU each; without it this process is one rank, as the environment says
    #[arg(long, value_name = "N")]
    pub nproc: Option<usize>,
    /// Steps to time
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub steps: usize,
    /// Override one key of the [train] table, e.g. activation_checkpointing=full
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Lines of the table of kernels
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub kernels: usize,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

/// `fulgurite bench attention`
#[derive(Debug, Args)]
pub struct BenchAttention {
    /// Rows, heads and tokens: B,H,T; may be given several times
    #[arg(
        long = "shape",
        value_name = "B,H,T",
        value_delimiter = ' ',
        default_value = "4,32,2048 4,32,8192 4,32,32768 8,8,2048 1,8,65536 16,16,2048"
    )]
    pub shapes: Vec<String>,
    /// Width of a head
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub width: usize,
    /// End a document every so many tokens
    #[arg(long, value_name = "TOKENS")]
    pub document_tokens: Option<usize>,
    /// Take queries and keys through SiLU inside of the kernel
    #[arg(long)]
    pub silu: bool,
    /// Tensors in float16 instead of bf16
    #[arg(long)]
    pub float16: bool,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Print as JSON, a line each
    #[arg(long)]
    pub json: bool,
}

/// `8GiB`, `512MiB`, `1000000`.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| format!("not a size: {text}"))?;
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1u64,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(format!("unknown unit {unit:?}: use KiB, MiB, GiB or TiB")),
    };
    Ok((number * factor as f64) as u64)
}

/// `100000000`, `1e10`, `250_000`.
fn parse_count(text: &str) -> Result<u64, String> {
    let number: f64 = text.replace(['_', ','], "").parse().map_err(|_| format!("not a number: {text}"))?;
    if number.fract() == 0.0 && (1.0..=1e12).contains(&number) {
        Ok(number as u64)
    } else {
        Err(format!("{text} is not a whole number from 1 to 1e12"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn counts_are_whole() {
        assert_eq!(parse_count("1e10"), Ok(10_000_000_000));
        assert_eq!(parse_count("250_000"), Ok(250_000));
        assert!(parse_count("1.5").is_err() && parse_count("0").is_err() && parse_count("many").is_err());
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("8GiB"), Ok(8 << 30));
        assert_eq!(parse_size("1.5k"), Ok(1536));
        assert_eq!(parse_size("10"), Ok(10));
        assert!(parse_size("3 parsecs").is_err());
    }
}
