//! Exit codes: 0 done, 1 the work failed, 2 wrong usage or recipe, 128 + signal when stopped.

use std::io;
use std::process::ExitCode;

use crate::cli::LogFormat;
use crate::launch::RankFailed;
use crate::output;
use crate::stop;

/// Wrong usage or a recipe that cannot be read: the user must change the command.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// Report an error on stderr and choose the code.
pub fn code(result: anyhow::Result<()>, format: LogFormat) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    // `fulgurite sql … | head` is not a failure.
    if error.chain().any(|e| e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)) {
        return ExitCode::SUCCESS;
    }
    output::error(&error, format);
    if let Some(failed) = error.chain().find_map(|error| error.downcast_ref::<RankFailed>()) {
        return ExitCode::from(failed.code);
    }
    if error.chain().any(interrupted) {
        return ExitCode::from(stop::exit_code());
    }
    ExitCode::from(if error.chain().any(wrong_usage) { 2 } else { 1 })
}

fn interrupted(error: &(dyn std::error::Error + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(pipeline::Error::Interrupted))
}

fn wrong_usage(error: &(dyn std::error::Error + 'static)) -> bool {
    error.is::<Usage>()
        || matches!(error.downcast_ref(), Some(pipeline::Error::Recipe(_) | pipeline::Error::Setting { .. }))
        || matches!(
            error.downcast_ref(),
            Some(train::Error::NoModel { .. } | train::Error::Config { .. } | train::Error::Device { .. })
        )
}

/// A command line that cannot be read, or one that asks for help.
pub fn usage(error: &clap::Error) -> ExitCode {
    let mut arguments = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).peekable();
    let mut json = false;
    while let Some(argument) = arguments.next() {
        json |= argument == "--log-format=json"
            || argument == "--log-format" && arguments.peek().is_some_and(|value| value == "json");
    }
    if error.use_stderr() && json {
        output::error(&anyhow::anyhow!("{}", error.render().to_string().trim_end()), LogFormat::Json);
    } else {
        // Help goes to stdout, errors to stderr; a closed pipe is nobody's fault.
        let _ = error.print();
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}
